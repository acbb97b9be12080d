"""The OpenAI-compatible proxy that records every call, and the in-process clients to it."""
