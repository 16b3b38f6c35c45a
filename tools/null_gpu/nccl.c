/* NCCL between processes of this machine that have a null device: bytes move through a file that all ranks of a communicator map.

   Every call is complete when it returns. With NULL_GPU_VIRTUAL=1, or in a communicator whose other ranks do not exist (a plan of 64
   ranks measured by one process), each rank answers alone: what others would send are its own bytes, which it sends to them. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

int null_gpu_is_virtual(void);
int null_gpu_leaves_out(size_t bytes);

enum { SUCCESS = 0, SYSTEM_ERROR = 2, MOST_RANKS = 16, SLOT = 1 << 22, MAILBOX = 1 << 20 };

struct mailbox { atomic_int full; size_t bytes; char data[MAILBOX]; };
struct shared {
    atomic_int arrived, turn;
    char slots[MOST_RANKS][SLOT];
    struct mailbox mail[MOST_RANKS][MOST_RANKS]; /* [from][to] */
};
struct communicator { int ranks, rank; struct shared *shared; };
typedef struct { char bytes[128]; } unique_id;

int ncclGetVersion(int *version) { *version = 22809; return SUCCESS; }
const char *ncclGetErrorString(int error) { return "null device"; }
const char *ncclGetLastError(void *communicator) { return "null device"; }
int ncclGetUniqueId(unique_id *id) {
    int source = open("/dev/urandom", O_RDONLY);
    memset(id, 0, sizeof *id);
    int complete = source >= 0 && read(source, id->bytes, 16) == 16;
    if (source >= 0) close(source);
    return complete ? SUCCESS : SYSTEM_ERROR;
}

static void path_of(char *path, const unique_id *id) {
    strcpy(path, "/tmp/null-nccl-");
    for (int byte = 0; byte < 16; byte++) sprintf(path + strlen(path), "%02x", (unsigned char)id->bytes[byte]);
}

static struct shared *shared_by(const unique_id *id) {
    char path[96];
    path_of(path, id);
    int file = open(path, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(struct shared))) return NULL;
    void *place = mmap(NULL, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return place == MAP_FAILED ? NULL : place;
}

static void meet(struct communicator *group) {
    struct shared *shared = group->shared;
    int turn = atomic_load(&shared->turn);
    if (atomic_fetch_add(&shared->arrived, 1) == group->ranks - 1) {
        atomic_store(&shared->arrived, 0);
        atomic_fetch_add(&shared->turn, 1);
        return;
    }
    while (atomic_load(&shared->turn) == turn) sched_yield();
}

static void forget(const unique_id *id) {
    char path[96];
    path_of(path, id);
    unlink(path);
}

int ncclCommInitRankConfig(void **made, int ranks, unique_id id, int rank, void *settings) {
    struct communicator *group = calloc(1, sizeof *group);
    group->ranks = ranks;
    group->rank = rank;
    if (ranks > 1 && ranks <= MOST_RANKS && !null_gpu_is_virtual()) {
        group->shared = shared_by(&id);
        if (!group->shared) return SYSTEM_ERROR;
        meet(group);
        if (rank == 0) forget(&id);
    }
    *made = group;
    return SUCCESS;
}
int ncclCommInitRank(void **made, int ranks, unique_id id, int rank) { return ncclCommInitRankConfig(made, ranks, id, rank, NULL); }
int ncclCommCount(struct communicator *group, int *ranks) { *ranks = group->ranks; return SUCCESS; }
int ncclCommUserRank(struct communicator *group, int *rank) { *rank = group->rank; return SUCCESS; }
int ncclCommGetAsyncError(void *group, int *error) { *error = 0; return SUCCESS; }

static size_t size_of(int type) {
    static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; /* ncclDataType_t */
    return sizes[type];
}

static float wide(uint16_t narrow) {
    uint32_t bits = (uint32_t)narrow << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#define COMBINE(one, other) (how == 1 ? (one) * (other) : how == 2 ? ((one) > (other) ? (one) : (other)) \
                             : how == 3 ? ((one) < (other) ? (one) : (other)) : (one) + (other))
#define OVER(kind) for (size_t place = 0; place < count; place++) \
    ((kind *)into)[place] = COMBINE(((kind *)into)[place], ((const kind *)from)[place])

/* `into` combined with `from`; `how` is an ncclRedOp_t. A mean is taken as a sum: values mean nothing here. Half precision is copied. */
static void combine(void *into, const void *from, size_t count, int type, int how) {
    switch (type) {
    case 0: OVER(int8_t); break;
    case 1: OVER(uint8_t); break;
    case 2: OVER(int32_t); break;
    case 3: OVER(uint32_t); break;
    case 4: OVER(int64_t); break;
    case 5: OVER(uint64_t); break;
    case 7: OVER(float); break;
    case 8: OVER(double); break;
    case 9:
        for (size_t place = 0; place < count; place++) {
            float one = wide(((uint16_t *)into)[place]), other = wide(((const uint16_t *)from)[place]);
            ((uint16_t *)into)[place] = narrow(COMBINE(one, other));
        }
    }
}

int ncclAllReduce(const void *from, void *into, size_t count, int type, int how, struct communicator *group, void *stream) {
    size_t size = size_of(type), bytes = count * size;
    if (null_gpu_leaves_out(bytes)) return SUCCESS;
    if (from != into) memmove(into, from, bytes);
    if (!group->shared) return SUCCESS;
    for (size_t start = 0; start < bytes; start += SLOT) {
        size_t part = bytes - start < SLOT ? bytes - start : SLOT;
        memcpy(group->shared->slots[group->rank], (const char *)into + start, part);
        meet(group);
        /* In the order of the ranks, so that all of them compute the same bits. */
        memcpy((char *)into + start, group->shared->slots[0], part);
        for (int rank = 1; rank < group->ranks; rank++) combine((char *)into + start, group->shared->slots[rank], part / size, type, how);
        meet(group);
    }
    return SUCCESS;
}
int ncclReduce(const void *from, void *into, size_t count, int type, int how, int root, struct communicator *group, void *stream) {
    size_t bytes = count * size_of(type);
    if (null_gpu_leaves_out(bytes)) return SUCCESS;
    void *result = group->rank == root ? into : malloc(bytes + 1);
    int answer = ncclAllReduce(from, result, count, type, how, group, stream);
    if (result != into) free(result);
    return answer;
}
int ncclAllGather(const void *from, void *into, size_t count, int type, struct communicator *group, void *stream) {
    size_t bytes = count * size_of(type);
    if (null_gpu_leaves_out(bytes)) return SUCCESS;
    char *own = malloc(bytes + 1);
    memcpy(own, from, bytes);
    for (int rank = 0; rank < group->ranks && !group->shared; rank++) memcpy((char *)into + rank * bytes, own, bytes);
    for (size_t start = 0; group->shared && start < bytes; start += SLOT) {
        size_t part = bytes - start < SLOT ? bytes - start : SLOT;
        memcpy(group->shared->slots[group->rank], own + start, part);
        meet(group);
        for (int rank = 0; rank < group->ranks; rank++) memcpy((char *)into + rank * bytes + start, group->shared->slots[rank], part);
        meet(group);
    }
    free(own);
    return SUCCESS;
}
int ncclReduceScatter(const void *from, void *into, size_t count, int type, int how, struct communicator *group, void *stream) {
    size_t bytes = count * size_of(type);
    if (null_gpu_leaves_out(bytes)) return SUCCESS;
    if (!group->shared) {
        memmove(into, (const char *)from + group->rank * bytes, bytes);
        return SUCCESS;
    }
    char *whole = malloc(bytes * group->ranks + 1);
    int answer = ncclAllReduce(from, whole, count * group->ranks, type, how, group, stream);
    memcpy(into, whole + group->rank * bytes, bytes);
    free(whole);
    return answer;
}
int ncclBroadcast(const void *from, void *into, size_t count, int type, int root, struct communicator *group, void *stream) {
    size_t bytes = count * size_of(type);
    if (null_gpu_leaves_out(bytes)) return SUCCESS;
    if (from != into && (group->rank == root || !group->shared)) memmove(into, from, bytes);
    for (size_t start = 0; group->shared && start < bytes; start += SLOT) {
        size_t part = bytes - start < SLOT ? bytes - start : SLOT;
        if (group->rank == root) memcpy(group->shared->slots[root], (const char *)into + start, part);
        meet(group);
        if (group->rank != root) memcpy((char *)into + start, group->shared->slots[root], part);
        meet(group);
    }
    return SUCCESS;
}
int ncclBcast(void *place, size_t count, int type, int root, struct communicator *group, void *stream) {
    return ncclBroadcast(place, place, count, type, root, group, stream);
}
int ncclRedOpCreatePreMulSum(int *made, void *scale, int type, int residence, void *group) { *made = 0; return SUCCESS; }

/* Messages between two ranks wait until the group of calls ends, as all of them may be needed for progress. */
struct message { int sends, peer; char *place; size_t bytes, moved; struct communicator *group; };
static struct message *waiting;
static size_t waiting_count, waiting_room;
static int depth;

static int progress(struct message *message) {
    struct shared *shared = message->group->shared;
    int own = message->group->rank;
    struct mailbox *box = message->sends ? &shared->mail[own][message->peer] : &shared->mail[message->peer][own];
    if (message->moved == message->bytes || atomic_load(&box->full) != !message->sends) return 0;
    size_t part = message->bytes - message->moved < MAILBOX ? message->bytes - message->moved : MAILBOX;
    if (message->sends) memcpy(box->data, message->place + message->moved, part);
    else memcpy(message->place + message->moved, box->data, part);
    message->moved += part;
    atomic_store(&box->full, message->sends);
    return 1;
}
static int is_first(size_t number) {
    /* Messages between the same two ranks keep their order. */
    for (size_t earlier = 0; earlier < number; earlier++)
        if (waiting[earlier].moved < waiting[earlier].bytes && waiting[earlier].sends == waiting[number].sends &&
            waiting[earlier].peer == waiting[number].peer && waiting[earlier].group == waiting[number].group) return 0;
    return 1;
}
/* The other rank does not exist: it would send what is sent to it. */
static void answer_alone(struct message *wanted) {
    for (size_t number = 0; number < waiting_count && !wanted->sends; number++) {
        struct message *sent = &waiting[number];
        if (sent->sends && sent->peer == wanted->peer && sent->group == wanted->group && sent->bytes == wanted->bytes &&
            !null_gpu_leaves_out(sent->bytes)) memmove(wanted->place, sent->place, sent->bytes);
    }
    wanted->moved = wanted->bytes;
}
static void deliver(void) {
    for (size_t open = 1; open;) {
        open = 0;
        int moved = 0;
        for (size_t number = 0; number < waiting_count; number++) {
            if (!waiting[number].group->shared) answer_alone(&waiting[number]);
            else if (is_first(number)) moved |= progress(&waiting[number]);
            open += waiting[number].moved < waiting[number].bytes;
        }
        if (!moved) sched_yield();
    }
    waiting_count = 0;
}
static int post(int sends, void *place, size_t bytes, int peer, struct communicator *group) {
    if (waiting_count == waiting_room) waiting = realloc(waiting, (waiting_room = 2 * waiting_room + 8) * sizeof *waiting);
    waiting[waiting_count++] = (struct message){sends, peer, place, bytes, 0, group};
    if (!depth) deliver();
    return SUCCESS;
}
int ncclSend(const void *place, size_t count, int type, int peer, struct communicator *group, void *stream) {
    return post(1, (void *)place, count * size_of(type), peer, group);
}
int ncclRecv(void *place, size_t count, int type, int peer, struct communicator *group, void *stream) {
    return post(0, place, count * size_of(type), peer, group);
}
int ncclGroupStart(void) { depth++; return SUCCESS; }
int ncclGroupEnd(void) {
    if (!--depth) deliver();
    return SUCCESS;
}
int ncclAlltoAll(const void *from, void *into, size_t count, int type, struct communicator *group, void *stream) {
    size_t bytes = count * size_of(type);
    ncclGroupStart();
    for (int rank = 0; rank < group->ranks; rank++) {
        ncclSend((const char *)from + rank * bytes, count, type, rank, group, stream);
        ncclRecv((char *)into + rank * bytes, count, type, rank, group, stream);
    }
    return ncclGroupEnd();
}
