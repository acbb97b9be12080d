"""Where the service's records outlive the process: nowhere, SQLite or Redis."""
