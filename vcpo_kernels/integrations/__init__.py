"""Trainers that VCPO plugs into, one module each. Nothing is imported here: a trainer's module imports that trainer."""
