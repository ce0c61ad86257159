"""The one quantizer core: tensors in, tensors out. Knows no model, method, device policy or file."""
