"""Words that make a training tiny."""

TINY = [
    "network.channels=[16,16]",
    "network.norm_groups=8",
    "network.layers=1",
    "network.attention=[]",
    "network.head_dim=8",
    "optim.decay=none",
    "data.labels=false",
    "trainer.progress=false",
]


def last_words(words):
    """Return the words of a command line, of each key only the last: a command refuses two."""
    words = [str(word) for word in words]
    keys = [word.partition("=")[0] for word in words]
    return [w for i, w in enumerate(words) if "=" not in w or keys[i] not in keys[i + 1 :]]
