"""Understanding a backbone by running it; the door is `understand`.

`observing` notes every call of one forward, `stages` tells a stage's tokens and coordinates from that, `surroundings`
the stem, heads and prefix tokens; `understanding` puts all of it together and tries prompts among the tokens.
"""

from point_peft.tracing.understanding import understand

__all__ = ["understand"]
