"""What the compilers make of every kernel, without a GPU: machine code held against committed tables."""
