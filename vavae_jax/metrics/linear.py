"""What is linear in vectors, their classes or other vectors: fitted on some, measured on others."""

from __future__ import annotations

import numpy as np

RIDGE = 0.01  # in units of the mean variance of the inputs


def accuracy(
  x_nD: np.ndarray, label_n: np.ndarray, held_out_mD: np.ndarray, held_out_label_m: np.ndarray
) -> float:
  """Share of held-out vectors whose class a linear least-squares classifier finds, in [0, 1].

  Labels are int [n] and [m].
  """
  classes = np.arange(max(label_n.max(), held_out_label_m.max()) + 1)
  scores_mC = _predicted(x_nD, (label_n[:, None] == classes).astype(np.float32), held_out_mD)
  return float(np.mean(scores_mC.argmax(1) == held_out_label_m))


def explained(
  x_nD: np.ndarray, y_nE: np.ndarray, held_out_x_mD: np.ndarray, held_out_y_mE: np.ndarray
) -> float:
  """Share of the variance of held-out y that a linear function of x explains; 1: all of it.

  Below 0 where the function, fitted on the first n rows, is worse than their mean.
  """
  rest_mE = held_out_y_mE - _predicted(x_nD, y_nE, held_out_x_mD)
  spread_mE = held_out_y_mE - y_nE.mean(0, dtype=np.float64)
  return float(1 - np.square(rest_mE).sum() / np.square(spread_mE).sum())


def _predicted(x_nD: np.ndarray, y_nE: np.ndarray, other_mD: np.ndarray) -> np.ndarray:
  """y of the other x by ridge regression, float64 [m, E]."""
  mean_D, mean_E = x_nD.mean(0, dtype=np.float64), y_nE.mean(0, dtype=np.float64)
  x_nD, y_nE = x_nD - mean_D.astype(x_nD.dtype), y_nE - mean_E.astype(y_nE.dtype)
  gram_DD = (x_nD.T @ x_nD).astype(np.float64)
  gram_DD[np.diag_indices_from(gram_DD)] += RIDGE * np.trace(gram_DD) / len(gram_DD)
  weights_DE = np.linalg.solve(gram_DD, (x_nD.T @ y_nE).astype(np.float64))
  return (other_mD - mean_D) @ weights_DE + mean_E
