/* What the driver and the runtime of a null device answer alike: an H200 by its limits, and the version of CUDA. */
enum { CUDA_RELEASE = 13000 };

/* Numbers are those of CUdevice_attribute, which enum cudaDeviceAttr shares. */
static int limit_of(int attribute) {
    switch (attribute) {
    case 75: return 9;         /* compute capability, major */
    case 76: return 0;         /* minor */
    case 16: return 132;       /* multiprocessors */
    case 39: return 2048;      /* threads of one */
    case 106: return 32;       /* blocks of one */
    case 81: return 233472;    /* shared memory of one */
    case 8: return 49152;      /* shared memory of a block */
    case 97: return 232448;    /* the same, opted in */
    case 1: return 1024;       /* threads of a block */
    case 82: case 12: return 65536; /* registers of a multiprocessor, of a block */
    case 10: return 32;        /* warp */
    case 38: return 62914560;  /* L2 cache */
    case 36: return 2619000;   /* memory clock, kHz */
    case 37: return 5120;      /* bus width */
    case 13: return 1980000;   /* clock, kHz */
    default: return 1;
    }
}
