"""The Triton backend: a file per op, which bears the op's name. `launch` has what every launch needs.

The imports below run before anything else can import one of these files, so a name such as `triton.linear` is always
the op, never its file.
"""

from .advance import advance as advance
from .count_prompt import count_prompt as count_prompt
from .draft import draft as draft
from .embed import embed as embed
from .linear import linear as linear
from .linear import linear_add as linear_add
from .linear import rms_norm_linear as rms_norm_linear
from .linear import rms_norm_qkv_rope_cache as rms_norm_qkv_rope_cache
from .linear import rms_norm_swiglu as rms_norm_swiglu
from .linear_few_rows import FEW_ROWS as _FEW_ROWS
from .paged_attention import paged_attention as paged_attention
from .rms_norm import rms_norm as rms_norm
from .rope_and_cache import rope_and_cache as rope_and_cache
from .sample import sample as sample
from .store_row import store_row as store_row
from .swiglu import swiglu as swiglu

INVARIANT_ROWS = _FEW_ROWS
# Whether the bits of a row may depend on how many rows a launch of more than INVARIANT_ROWS has: cuBLAS chooses its
# kernels by that.
ROW_COUNT_CHANGES_BITS = True
