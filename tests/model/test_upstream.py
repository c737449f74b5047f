"""Transformers' own test suite, run on our classes: `ModelTesterMixin` and `ConfigTester` of the installed version.

The suite is not part of the installed wheel; it comes from the sdist of the same version (`make test` fetches it into
`.cache/`, or `TRANSFORMERS_TESTS` names a folder). The sdist holds only the top-level test files, so the three helper
modules that they import beside themselves are stood in for here. Where the suite is missing, a test fails; nothing is
skipped for that reason.
"""

import importlib
import os
import sys
import types
import unittest
import warnings
from pathlib import Path
from typing import ClassVar
from unittest import mock

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from linformer_hf import (
    LinformerConfig,
    LinformerForMaskedLM,
    LinformerForMultipleChoice,
    LinformerForQuestionAnswering,
    LinformerForSequenceClassification,
    LinformerForTokenClassification,
    LinformerModel,
)


VERSION = transformers.__version__
CACHE = Path(__file__).parents[2] / ".cache"
SUITE = Path(os.environ.get("TRANSFORMERS_TESTS") or CACHE / f"transformers-{VERSION}" / "tests")
HOW_TO_GET_IT = (
    f"{SUITE / 'test_modeling_common.py'} is missing. Get transformers' own tests with\n"
    f"  pip download --no-deps --no-binary :all: transformers=={VERSION} -d {CACHE}\n"
    f"  tar -xzf {CACHE}/transformers-{VERSION}.tar.gz -C {CACHE} transformers-{VERSION}/tests\n"
    "or set TRANSFORMERS_TESTS to a folder that holds them (the `tests` folder of that version's source)."
)
PACKAGE = "transformers_own_tests"  # a name of its own: `tests` and `transformers` are taken
# Common arguments with a value that is not their default, for ConfigTester (`utils/test_configuration_utils.py`).
CONFIG_COMMON_KWARGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": False,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["LinformerModel"],
    "id2label": {0: "label"},
    "label2id": {"label": "0"},
    "problem_type": "regression",
    "pad_token_id": 7,
    "bos_token_id": 8,
    "eos_token_id": 9,
}


def import_suite(name: str) -> types.ModuleType:
    """Import one file of the suite as a member of a package, so that its relative imports work."""

    def module(path: str, **members) -> None:
        full = f"{PACKAGE}.{path}".rstrip(".")
        if full not in sys.modules:
            sys.modules[full] = types.ModuleType(full)
            sys.modules[full].__path__ = [str(SUITE / path.replace(".", "/"))]
            sys.modules[full].__dict__.update(members)

    module("")
    for parent in ("exporters", "generation", "utils"):
        module(parent)
    module("exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    module("generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    module("utils.test_configuration_utils", config_common_kwargs=CONFIG_COMMON_KWARGS)
    # test_configuration_common.py imports "transformers" a second time from a checkout that is not there.
    stand_in = mock.patch("transformers.utils.direct_transformers_import", return_value=transformers)
    with stand_in, warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnknownMarkWarning)  # the library registers its own marks
        return importlib.import_module(f"{PACKAGE}.{name}")


def test_the_suite_is_present():
    assert (SUITE / "test_modeling_common.py").is_file(), HOW_TO_GET_IT


class LinformerModelTester:
    """A tiny model and inputs for it, under the names that the common tests read."""

    def __init__(self, parent, **config_arguments):
        self.parent = parent
        self.config_arguments = config_arguments
        self.batch_size = 5
        self.seq_length = 11
        self.is_training = True
        self.num_hidden_layers = 2
        self.num_attention_heads = 4
        self.hidden_size = 32
        self.num_labels = 3
        self.num_choices = 4
        self.key_length = 4  # K: attention maps are [B, H, N, K]

    def get_config(self) -> LinformerConfig:
        return LinformerConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            max_position_embeddings=16,
            projected_length=self.key_length,
            num_labels=self.num_labels,
            **self.config_arguments,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        mask = torch.randint(2, shape, device=torch_device)
        mask[:, 0] = 1  # no empty row, as in the suite's own `random_attention_mask`
        return self.get_config(), {
            "input_ids": torch.randint(99, shape, device=torch_device),
            "token_type_ids": torch.randint(2, shape, device=torch_device),
            "attention_mask": mask,
        }


class LinformerSuite:
    """What every projection type has in common. Subclasses add `config_arguments` and transformers' mixin."""

    all_model_classes = (
        LinformerModel,
        LinformerForMaskedLM,
        LinformerForSequenceClassification,
        LinformerForTokenClassification,
        LinformerForQuestionAnswering,
        LinformerForMultipleChoice,
    )
    config_arguments: ClassVar[dict] = {}
    # It wants what was renamed on loading to be named back on saving. Ours is for reading older files, and what is
    # saved has the one new name (`test_files_with_the_older_names_of_the_bias_load`).
    test_reverse_loading_mapping = None

    def setUp(self):
        self.model_tester = LinformerModelTester(self, **self.config_arguments)
        # The suite knows heads by the library's own tables; for the length of a test ours stand in them too.
        for table, model_class in (
            ("MODEL_MAPPING_NAMES", LinformerModel),
            ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", LinformerForMaskedLM),
            ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", LinformerForSequenceClassification),
            ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", LinformerForTokenClassification),
            ("MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", LinformerForQuestionAnswering),
            ("MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES", LinformerForMultipleChoice),
        ):
            patch = mock.patch.dict(getattr(modeling_auto, table), {"linformer": model_class.__name__})
            patch.start()
            self.addCleanup(patch.stop)

    def test_resize_position_vector_embeddings(self):
        """Replaces the common test, which expects the first rows to stay: ours are interpolated (design decision)."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).to(torch_device)
            for size in (config.max_position_embeddings + 8, 12):  # both are multiples of K, as `conv` needs
                model.resize_position_embeddings(size)
                self.assertEqual(model.config.max_position_embeddings, size)
                self.assertEqual(model.get_position_embeddings().weight.shape[0], size)
                model(**self._prepare_for_class(inputs, model_class))


class OtherProjection(LinformerSuite):
    """Without the common test that takes six seconds for each class and reads nothing of a projection."""

    test_bc_torch_dtype = None


if (SUITE / "test_modeling_common.py").is_file():
    common = import_suite("test_modeling_common")
    configuration_common = import_suite("test_configuration_common")

    class LinformerModelTest(LinformerSuite, common.ModelTesterMixin, unittest.TestCase):
        """The default: linear, one E for the model."""

        def test_config(self):
            tester = configuration_common.ConfigTester(
                self, config_class=LinformerConfig, hidden_size=36, num_attention_heads=4
            )
            tester.run_common_tests()

    class LinformerFixedModelTest(OtherProjection, common.ModelTesterMixin, unittest.TestCase):
        """E and F as buffers, one pair for each head."""

        config_arguments: ClassVar[dict] = {"projection_type": "fixed", "projection_sharing": "none"}

        def test_init_weights_can_init_buffers(self):
            """Replaces the common test, which wants the buffers as `__init__` left them without `_init_weights`.

            Ours are random and belong to `_init_weights` alone: from one seed, a model built on the meta device must
            get the same ones as a model built at once.
            """
            config = self.model_tester.get_config()
            for model_class in self.all_model_classes:
                with common.seeded_weight_init():
                    expected = dict(model_class(config).named_buffers())
                    with torch.device("meta"):
                        model = model_class(config)
                    model.to_empty(device="cpu")
                    model.init_weights()
                buffers = dict(model.named_buffers())
                self.assertEqual(sorted(buffers), sorted(expected))
                for name, buffer in buffers.items():
                    self.assertTrue(torch.equal(buffer, expected[name]), name)

    class LinformerConvModelTest(OtherProjection, common.ModelTesterMixin, unittest.TestCase):
        """Learned kernels in every layer."""

        config_arguments: ClassVar[dict] = {"projection_type": "conv", "projection_sharing": "headwise"}

    class LinformerPoolModelTest(OtherProjection, common.ModelTesterMixin, unittest.TestCase):
        """Windows that follow the real length: no parameters, but a bias on the slots."""

        config_arguments: ClassVar[dict] = {
            "projection_type": "mean_pool",
            "log_count_bias": True,
            "boundary_slots": True,
        }

    class LinformerGatedModelTest(OtherProjection, common.ModelTesterMixin, unittest.TestCase):
        """The extensions: gated windows, single tokens around each query, and a correction of the output."""

        config_arguments: ClassVar[dict] = {
            "projection_type": "gated_pool",
            "local_window": 1,
            "length_correction": True,
        }

        def test_retain_grad_hidden_states_attentions(self):
            """Without the maps: those of a band are put together from blocks when the output is already computed."""
            with mock.patch.object(type(self), "has_attentions", False):
                super().test_retain_grad_hidden_states_attentions()
