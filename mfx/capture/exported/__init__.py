"""What a capture by Dynamo needs while ``torch.export`` records."""

from mfx.capture.exported.aside import Sizes, beside_export, is_exporting

__all__ = ["Sizes", "beside_export", "is_exporting"]
