"""Keys that every stage has."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_minitron.config.meaning import NEUTRAL


@dataclass(kw_only=True)
class StageConfig:
    """Keys every stage has."""

    output_dir: str = field(default=MISSING, metadata=NEUTRAL)
    """Folder of the result. It appears, complete, when the stage ends well."""
    overwrite: bool = field(default=False, metadata=NEUTRAL)
    """Replace a complete result; without it a complete result is an error."""
    verify_inputs: str = field(default="full", metadata=NEUTRAL)
    """Check of input folders: ``full`` hashes every file, ``size`` compares sizes only."""
    workers: int = field(default=2, metadata=NEUTRAL)
    """Threads for tensor and file work."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.verify_inputs not in ("full", "size"):
            raise ValueError(f"verify_inputs={self.verify_inputs} must be full or size")
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1")
