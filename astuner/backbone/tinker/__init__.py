"""The `tinker` backbone: the local training loop over a service that speaks the Tinker API.

`run` is the backbone; `translate` says what becomes of the configuration, without the
SDK; `connection` is the only module that touches the SDK's clients. The rest of astuner
does not know that the model is elsewhere.
"""
