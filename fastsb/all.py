"The public API: `from fastsb.all import *`"

from fastsb.advice import *
from fastsb.buffer import *
from fastsb.callback import *
from fastsb.engine import *
from fastsb.fit_for import *
from fastsb.history import *
from fastsb.items import *
from fastsb.learner import *
from fastsb.losses import *
from fastsb.memory import *
from fastsb.plot import *
from fastsb.record import *
from fastsb.sampler import *
from fastsb.score import *
from fastsb.select import *
from fastsb.smaller import *
