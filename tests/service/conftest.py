"""The service needs the SDK's protobuf modules; an environment without them has no such tests."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("tinker") else ["test_*.py"]
