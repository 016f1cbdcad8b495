"""Results look at a prompt and in a notebook as they are printed."""

import numpy as np
import pytest

import keras_lp as lp
from keras_lp.audit import LeakageResult, MembershipLeakage, MembershipResult, UpdateLeakage
from keras_lp.federated.clients.describe import ClientLabels
from keras_lp.finetuning.rate_finder import LearningRates
from keras_lp.model.calibration import TaskCalibration
from keras_lp.privacy.report import PrivacyReport
from keras_lp.tflite.device.aggregation import DeviceRound
from keras_lp.tflite.export.report import ExportReport
from keras_lp.tflite.training.training import TrainableReport
from keras_lp.tuning.result import TrialResult
from keras_lp.utils.text_table import ShownAsText
from keras_lp.web.export import WebReport


def results():
    one = {"a<b": np.array([0.5, 0.6])}
    yield lp.Comparison({"a<b": "accuracy"}, one, one, {"a<b": np.zeros(2)})
    yield lp.describe_clients({"<x>": (np.zeros((3, 2)), np.array([0, 1, 1]))})
    trials = (TrialResult("0", {"<r": 0.1}, 0.5, 2), TrialResult("1", {"<r": 1.0}, None, 0, "no"))
    yield lp.TuningResult(None, {}, "val_loss", "min", trials, frozenset(), print)
    known = LeakageResult(np.zeros((1, 2)), np.zeros(1), np.full(1, np.nan), 0, None, None)
    yield UpdateLeakage("analytic", np.zeros((1, 2)), 3.0, {"<none": known})
    yield MembershipLeakage(9, 9, {"<loss": MembershipResult(0.5, (0, 1), 0.1, (0, 1), False)})
    yield lp.Calibration({"<a": TaskCalibration(2.0, 1.0, 0.5, 0.1, 0.0)})
    yield DeviceRound({}, (0,), {1: "it is < stale"})


@pytest.mark.parametrize("result", [*results()], ids=lambda result: type(result).__name__)
def test_a_result_is_its_table(result):
    assert repr(result) == str(result)
    assert "\n" in repr(result)
    shown = result._repr_html_()
    assert shown.startswith("<pre>")
    assert "<" not in shown[5:-6]
    assert shown.replace("&lt;", "<").replace("&gt;", ">")[5:-6] == str(result)


def test_all_results_are_shown_so():
    kinds = {*ShownAsText.__subclasses__()}
    named = {lp.Comparison, LearningRates, ClientLabels, ExportReport, TrainableReport, DeviceRound}
    named |= {lp.TuningResult, PrivacyReport, lp.PersonalModels}
    named |= {UpdateLeakage, MembershipLeakage, lp.Calibration, WebReport}
    assert kinds == named
