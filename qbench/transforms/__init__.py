"""Function-preserving rewrites of a block: what they do to its tensors, what they cost, what remains at run time."""
