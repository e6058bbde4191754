"""The scikit-learn classifier; the only room that imports scikit-learn."""

from mach.errors import ConfigError

try:
    from sklearn.utils.validation import validate_data as _validate_data  # noqa: F401
except ImportError as error:
    raise ConfigError(
        f"mach.MACHClassifier needs scikit-learn 1.6 or newer ({error}): pip install 'mach-classifier[sklearn]'"
    ) from error
