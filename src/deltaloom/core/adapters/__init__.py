"""Adapter kinds that PEFT does not bring, as PEFT methods of its own shape.

`import deltaloom.core.adapters` makes them known to PEFT, so that `PeftModel.from_pretrained` opens
their folders; without it PEFT stops with a KeyError that names the kind (`DELTALOOM_...`). One file
a kind: a config, a tuner, its layers and, at the end, one call of `register`.
"""

from deltaloom.core.adapters import bottleneck, composite, routed, sparse

__all__ = ["bottleneck", "composite", "routed", "sparse"]
