"""Reading medical images: so far, single DICOM radiographs."""

from sparseattn.data.dicom import Radiograph, load_radiograph, sample_radiograph_path, to_square

__all__ = ["Radiograph", "load_radiograph", "sample_radiograph_path", "to_square"]
