"""A method of one's own: weights and correlations, added up. Use it as `--method own_method:METHOD`."""

from isthmus.matching import METHODS, CoordinateDescent, Gain, Method, SinglePass, Then, weight_objective


class Sum:
    """An objective that is a sum of others, each divided by its own value for A against itself."""

    def __init__(self, parts):
        self.structure = parts[0].structure
        self.parts = [(1 / max(abs(part.value({})), 1e-12), part) for part in parts]

    def gains(self, cluster, at, *, all_terms=True):
        """Return the gains of all parts."""
        listed = [(scale, part.gains(cluster, at, all_terms=all_terms)) for scale, part in self.parts]
        return [Gain(scale * gain.matrix, gain.members) for scale, gains in listed for gain in gains]

    def value(self, at, groups=None):
        """Return the sum of the values."""
        return sum(scale * part.value(at, groups) for scale, part in self.parts)

    def cost(self, group, at):
        """Return the sum of the costs."""
        return sum(scale * part.cost(group, at) for scale, part in self.parts)


def _objective(problem, generator):
    return Sum([METHODS["correlation"].objective(problem, generator), weight_objective(problem.pair)])


SCHEDULE = Then(SinglePass(), CoordinateDescent())
METHOD = METHODS.register(
    Method("sum", "weights and correlation", _objective, needs="activations", schedule=SCHEDULE)
)
