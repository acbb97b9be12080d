"""The same small agent in each framework: only the model object, or its address, is astuner's."""
