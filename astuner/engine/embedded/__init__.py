"""The embedded torch model: one object that samples and trains, on one device thread."""
