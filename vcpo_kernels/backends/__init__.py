"""One folder a backend, one module an op. Leaves above the layers: `core/registry.py` imports them by name, at first use."""
