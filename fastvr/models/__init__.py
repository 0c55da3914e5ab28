"""The model families: configuration in, module tree out."""
