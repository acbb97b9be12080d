"""Trinity-RFT as a backbone: its explorer, trainer and queue, with astuner's episodes in them.

`translate` says what a configuration becomes, `compose` asks Trinity's own loader. The
modules named in the configuration by dotted path (`advantage`, `loss`, `batches`, and those
of the running half) are loaded by Trinity's processes and nowhere else.
"""
