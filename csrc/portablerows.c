/* Plain C: the elementwise kernels of training. */
#include "rows.h"

MG_ROWS_TABLE(mg_portable_rows, );
