"""``minitron plan <stage> key=value ...``: the keys of a stage as a pipeline of one item."""

from collections.abc import Sequence

from nemo_minitron.config import load

# Keys (or sections) that are those of ``plan`` itself; all others are the stage's.
_OWN = (
    "cluster",
    "nodes",
    "mfu",
    "json",
    "model",
    "output_dir",
    "overwrite",
    "verify_inputs",
    "workers",
    "hydra",
)


def of_one_stage(stage: str, arguments: Sequence[str]) -> list[str]:
    """Arguments of ``minitron plan`` that plan one stage.

    Args:
        stage: its name.
        arguments: keys of the stage and of ``plan``, and Hydra's flags.

    Raises:
        ValueError: a key of the stage is swept.
        HydraException: an override that does not parse.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

    flags = get_args_parser().parse_intermixed_args(list(arguments))
    kept = [word for word in arguments if word not in flags.overrides]
    config = {}
    for override in OverridesParser.create().parse_overrides(flags.overrides):
        key = override.key_or_group
        if key.partition(".")[0].partition("/")[0] in _OWN:
            kept.append(str(override.input_line))
        elif override.is_sweep_override():
            raise ValueError(
                f"{override.input_line} sweeps a key of {stage}; plan sweeps its own keys alone, "
                "such as nodes"
            )
        else:
            config[key] = override.value()
    return [load.override("stages", [{"name": stage, "stage": stage, "config": config}]), *kept]
