"""The official SDKs, in environments of their own, against a server process."""
