"""Many episodes: groups, concurrency, retries and the staleness gate."""
