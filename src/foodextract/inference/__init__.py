"""Images → records."""

from foodextract.models.startup import deferred_imports

with deferred_imports():  # before anything else imports a model class
    from transformers.models.smolvlm import image_processing_smolvlm, modeling_smolvlm, processing_smolvlm  # noqa: F401
