"""The theory of linear mode connectivity, as functions to run: rates, widths, experiments.

Every docstring says whose statement it is: **[P]** the paper (Ferbach, Goujaud, Gidel and Dieuleveut, AISTATS
2024), **[L]** other literature, **[O]** ours, proved on the theory pages of the documentation with explicit
constants ("Theory, section 2.3" is the section of that number there). Everything
is float64 inside; arrays and torch tensors are accepted, numpy arrays and floats are returned.
"""

from isthmus.certificates import Certificate, Envelope, WeightsOnlyBound, certify, certify_weights_only
from isthmus.theory._box import box_upper, cube_upper
from isthmus.theory._closed_form import closed_form_upper
from isthmus.theory._deep import (
    GroupedError,
    LmcBound,
    gaussian_lmc_bound,
    grouped_lmc_error,
    property1_recursion,
)
from isthmus.theory._dropout import bernoulli_dropout_error, dropout_error
from isthmus.theory._experiments import (
    Law,
    dimension_record,
    dropout_record,
    mean_field_record,
    rate_record,
    width_record,
)
from isthmus.theory._gaussian import gaussian_upper, isotropic_gaussian_upper
from isthmus.theory._identities import EquiPartition, equipartition, layer_output_error
from isthmus.theory._low_dimension import (
    Interval,
    concentration_tail,
    low_dimension_bounds,
    low_dimension_rows,
)
from isthmus.theory._lower import gaussian_volume_lower, nearest_neighbour_lower, volume_lower
from isthmus.theory._mean_field import (
    MeanFieldSettings,
    Neuron,
    SharedDraws,
    TanhNeuron,
    mean_field_pairs,
    mean_field_sgd,
    reference_target,
)
from isthmus.theory._mean_field_experiment import (
    ChaosTest,
    MatchedClouds,
    MeanFieldCurve,
    WidthBracket,
    chaos_test,
    curvature_bound,
    lipschitz_bound,
    lmc_error,
    match_clouds,
    mean_field_curve,
    n_min,
)
from isthmus.theory._rates import DimensionFit, RateCurve, fit_dimension, rate_curve, rate_curve_of_rows
from isthmus.theory._subgaussian import sub_gaussian_upper
from isthmus.theory._tower import Tower
from isthmus.theory._width import (
    LowDimensionWidth,
    entezari_log10_width,
    layer_tolerance,
    log_width_low_dimension,
    log_width_lower,
    log_width_sub_gaussian,
    log_width_upper,
    width_recursion,
)
from isthmus.transport import (
    approximate_dimension,
    approximate_dimension_unbiased,
    entropy_rank,
    stable_rank,
    w2_matching,
)

__all__ = [
    "SharedDraws",
    "Law",
    # certificates
    "Certificate",
    "Envelope",
    "WeightsOnlyBound",
    "certify",
    "certify_weights_only",
    # identities
    "EquiPartition",
    "equipartition",
    "layer_output_error",
    "w2_matching",
    # bounds on the transport distance of two samples
    "Interval",
    "box_upper",
    "closed_form_upper",
    "concentration_tail",
    "cube_upper",
    "gaussian_upper",
    "gaussian_volume_lower",
    "isotropic_gaussian_upper",
    "low_dimension_bounds",
    "low_dimension_rows",
    "nearest_neighbour_lower",
    "sub_gaussian_upper",
    "volume_lower",
    # widths
    "GroupedError",
    "LmcBound",
    "LowDimensionWidth",
    "Tower",
    "entezari_log10_width",
    "gaussian_lmc_bound",
    "grouped_lmc_error",
    "layer_tolerance",
    "log_width_low_dimension",
    "log_width_lower",
    "log_width_sub_gaussian",
    "log_width_upper",
    "property1_recursion",
    "width_recursion",
    # empirical rates
    "DimensionFit",
    "RateCurve",
    "fit_dimension",
    "rate_curve",
    "rate_curve_of_rows",
    # mean field
    "ChaosTest",
    "MatchedClouds",
    "MeanFieldCurve",
    "MeanFieldSettings",
    "Neuron",
    "TanhNeuron",
    "WidthBracket",
    "chaos_test",
    "curvature_bound",
    "lipschitz_bound",
    "lmc_error",
    "match_clouds",
    "mean_field_curve",
    "mean_field_pairs",
    "mean_field_sgd",
    "n_min",
    "reference_target",
    # dropout
    "bernoulli_dropout_error",
    "dropout_error",
    # tables as plain data
    "dimension_record",
    "dropout_record",
    "mean_field_record",
    "rate_record",
    "width_record",
    # dimensions
    "approximate_dimension",
    "approximate_dimension_unbiased",
    "entropy_rank",
    "stable_rank",
]
