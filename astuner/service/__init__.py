"""The fine-tuning service: one base model, many tenants, over the Tinker protocol.

`serve.serve(config)` runs it; `service.Service` is all of it but HTTP and may be
driven in process. Speaks to the model only through `engine.protocol.AdapterHost`.
"""
