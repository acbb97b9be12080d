"""The Tinker protocol over HTTP: what comes in, what goes out, and nothing that decides."""
