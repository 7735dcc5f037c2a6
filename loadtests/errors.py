"""Why a measurement cannot be made. Every message is written for the user and names what to change.

LoadTestError
├── PayloadError     the images to send are unavailable          (generator/readers.py)
├── ArmError         an arm is malformed, or its commit unknown  (experiment/arms.py)
├── ServerError      a server did not start, or died             (experiment/server.py)
├── StoreError       the folder holds another measurement        (experiment/store.py)
├── ResultsError     an earlier results.json is unusable         (report/document.py)
├── SizingError      no number of machines reaches the target  (capacity/)
├── AccuracyError    the models cannot be evaluated              (accuracy/)
└── MlperfError      LoadGen did not finish                      (mlperf/)
"""


class LoadTestError(Exception):
    """Base of the errors that a command reports in one line, without a traceback."""
