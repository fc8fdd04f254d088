from nemo_minitron.api import export as export
from nemo_minitron.api import make_plan as make_plan
from nemo_minitron.api import open_model as open_model
from nemo_minitron.api import prune as prune
from nemo_minitron.api import prune_checkpoint as prune_checkpoint
from nemo_minitron.api import score as score
from nemo_minitron.config.distillation import DistillationConfig as DistillationConfig
from nemo_minitron.config.parallel import ParallelConfig as ParallelConfig
from nemo_minitron.models.in_schedule import Distillation as Distillation
from nemo_minitron.pruning.plan import Plan as Plan
from nemo_minitron.pruning.scores import Scores as Scores

__all__: list[str]
__version__: str
