"""Loss spikes in plain Python: what counts as one, how often they come, and what to do about them.

No torch, and nothing of the run: a curve from anywhere can be scored. The state of everything here is plain JSON, so a
resumed run gives the same figures as an unbroken one, and the same code scores a finished curve.
"""

from __future__ import annotations
