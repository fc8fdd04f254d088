"""``minitron <stage> key=value ...``."""

import importlib
import sys

from nemo_minitron.config.schema import STAGE_CONFIGS, conf_dir, register_schemas


def main() -> int:
    """Compose the config of a stage, check it, run it."""
    import hydra
    from omegaconf import DictConfig, OmegaConf

    stage = sys.argv[1]
    del sys.argv[1]
    register_schemas()

    def job(cfg: DictConfig) -> None:
        cls = STAGE_CONFIGS[stage]
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), cfg))
        module = importlib.import_module(f"nemo_minitron.stages.{'import_' if stage == 'import' else stage}")
        module.check(config)
        module.run(config)

    hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=stage)(job)()
    return 0
