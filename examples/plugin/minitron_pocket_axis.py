"""An axis: the channels of a head, the same in all heads of a layer.

It is a size that can be pruned where queries and keys are not rotated, as in a Pocket: rotation
would pair channels by their place. Which rows of which tensor are channels of a head is known from
the parameter tables. A file of an axis imports ``config.axis`` and ``config.layers`` alone.
"""

from nemo_minitron.config.axis import Axis, Scope
from nemo_minitron.config.layers import ATTENTION

HEAD_CHANNELS = Axis(
    "head_dim",
    size="kv_channels",
    scope=Scope.LAYER,
    kind=ATTENTION,
    seen_at="self_attention.linear_proj",
    seen_dim="head",
    grain=2,
    label="head channels",
    doc="Channels of every head, where queries and keys are not rotated.",
)
