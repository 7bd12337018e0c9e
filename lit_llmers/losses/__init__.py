"""Loss functions: pure maths, one equation each, on plain tensors."""
