"""Forgetting classes, clients and attributes: scores, masks, edits, detachers, and how forgetting is measured
(torch only).
"""

DETACHERS = {
    "none": "fedsim.unlearning.detach:Nothing",
    "mmd": "fedsim.unlearning.detach:Mmd",
    "covariance": "fedsim.unlearning.detach:Covariance",
    "gradient-reversal": "fedsim.unlearning.adversaries:GradientReversal",
    "representation-detachment": "fedsim.unlearning.adversaries:RepresentationDetachment",
}
