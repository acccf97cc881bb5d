"""Understanding a backbone by running it; the door is `understand`.

`observing` notes every call of one forward, `dense` and `packed` tell a stage's tokens and coordinates from that,
`surroundings` the stem, heads and prefix tokens; `trial` puts prompts among the tokens.
"""

from point_peft.tracing.understanding import understand

__all__ = ["understand"]
