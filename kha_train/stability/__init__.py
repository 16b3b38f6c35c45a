"""Loss spikes in plain Python: what counts as a spike, how often spikes occur, and how the run reacts.

Needs neither torch nor a run: a curve from anywhere can be scored. All state is plain JSON, so a resumed run gives the
same figures as an uninterrupted one, and the same code scores a finished curve.
"""

from __future__ import annotations
