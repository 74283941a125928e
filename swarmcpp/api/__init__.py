"""The OpenAI-compatible HTTP API of a node.

`fields` and `openai` turn JSON into queries, `replies` turns results into JSON (all three pure), `answers` runs a
query on a `core.Service`, `metrics` counts, and `server` speaks HTTP.
"""
