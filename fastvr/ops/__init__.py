"""The ops: contract, validation, allocation, choice of implementation, gradient."""
