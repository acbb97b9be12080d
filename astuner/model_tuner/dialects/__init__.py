"""Other dialects than Chat Completions, each a translation to it and back.

A dialect turns its request into a chat request, and the chat answer, whole or in chunks,
into its own. What answers the chat request (an engine's `ChatCompletions`, the relay's
`RelayChat`) does not know of it, so tokens, records, refusals and retries are the same.
Nothing here samples, renders or records.
"""
