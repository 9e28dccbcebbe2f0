"""What the peers do with one kernel; run by their own interpreter, prints one JSON object.

python _submodular_peer.py PEER FUNCTION FEATURES.npy OTHERS.npy BUDGET WEIGHT
"""

import json
import sys
import time

import numpy as np


def submodlib(name, kernel, others, budget, weight):
    """Constructor and LazyGreedy of submodlib-py; kernel (n, n), others (n, q)."""
    import submodlib

    n, q = others.shape
    made = {
        "facility": lambda: submodlib.FacilityLocationFunction(
            n=n, mode="dense", sijs=kernel, separate_rep=False
        ),
        "flmi": lambda: submodlib.FacilityLocationMutualInformationFunction(
            n=n, num_queries=q, data_sijs=kernel, query_sijs=others, magnificationEta=weight
        ),
        "flcg": lambda: submodlib.FacilityLocationConditionalGainFunction(
            n=n, num_privates=q, data_sijs=kernel, private_sijs=others, privacyHardness=weight
        ),
        "graphcut": lambda: submodlib.GraphCutFunction(
            n=n, mode="dense", ggsijs=kernel, lambdaVal=weight, separate_rep=False
        ),
        "logdet": lambda: submodlib.LogDeterminantFunction(
            n=n, mode="dense", sijs=kernel, lambdaVal=weight
        ),
    }[name]()
    picks = made.maximize(
        budget=budget,
        optimizer="LazyGreedy",
        stopIfZeroGain=False,
        stopIfNegativeGain=False,
        show_progress=False,
    )
    return [int(j) for j, _ in picks]


def apricot(name, kernel, others, budget, weight):
    """Lazy greedy of apricot-select."""
    from apricot import FacilityLocationSelection

    made = FacilityLocationSelection(budget, metric="precomputed", optimizer="lazy")
    return [int(j) for j in made.fit(kernel).ranking]


def main():
    who, name, features, others, budget, weight = sys.argv[1:]
    features, others = np.load(features), np.load(others)
    kernel = np.maximum(features @ features.T, 0)
    do = {"submodlib": submodlib, "apricot": apricot}[who]
    small = np.maximum(features[:64] @ features[:64].T, 0)
    do(name, small, small[:, :4], 4, float(weight))  # imports and compilation are not timed
    start = time.process_time()
    picks = do(name, kernel, np.maximum(features @ others.T, 0), int(budget), float(weight))
    print(json.dumps({"cpu": time.process_time() - start, "picks": picks}))


if __name__ == "__main__":
    main()
