/* Plain C: the kernels of rows.h. */
#include "rows.h"

MG_ROWS_TABLE(mg_portable_rows, );
