/* A vendor's PKCS#11 module as it may misbehave: SoftHSM2 with faults (hsm.md 7).
 *
 * Steered by $FAKE_HSM/faults, read at each call because the caller is another process. A line is "C_Function fault":
 *   hang            never returns            crash           SIGSEGV
 *   slow            200 ms, then as usual    garbage         prints to stdout, then as usual
 *   device-error    CKR_DEVICE_ERROR         session-gone    CKR_SESSION_HANDLE_INVALID
 *   unsupported     CKR_MECHANISM_INVALID    lie             CKR_OK and nothing done
 *   zeros           CKR_OK and zeros         locked          CKR_PIN_LOCKED
 *   garble          CKR_OK, one bit wrong
 *   weaken          EXTRACTABLE reads true   once            fails once, then deletes the faults
 *   ended, ends, begins, began               END_DATE in 2000, 2999; START_DATE in 2999, 2000
 * $FAKE_HSM/logins gets a line per C_Login: what reaches the token can be counted.
 */
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long ulong_t;
typedef struct { ulong_t type; void *value; ulong_t length; } attribute_t;
typedef struct { unsigned char version[2]; void *function[68]; } list_t; /* CK_FUNCTION_LIST 2.40 */

enum { INITIALIZE = 0, GET_FUNCTION_LIST = 3, LOGIN = 18, DESTROY_OBJECT = 22, GET_ATTRIBUTE = 24, SET_ATTRIBUTE = 25,
       FIND_INIT = 26, ENCRYPT_INIT = 29, ENCRYPT = 30, DECRYPT = 34, WRAP = 60, UNWRAP = 61, RANDOM = 64 };
enum { OK = 0, DEVICE_ERROR = 0x30, MECHANISM_INVALID = 0x70, PIN_LOCKED = 0xA4, SESSION_GONE = 0xB3,
       START_DATE = 0x110, END_DATE = 0x111, EXTRACTABLE = 0x162 };

static list_t *real, ours;

static void path_of(char *path, size_t size, const char *name) {
    const char *directory = getenv("FAKE_HSM");
    snprintf(path, size, "%s/%s", directory ? directory : "/nonexistent", name);
}

/* The fault of that function, or "". */
static const char *fault(const char *function) {
    static char name[64], found[64];
    char path[4096];
    path_of(path, sizeof path, "faults");
    FILE *file = fopen(path, "r");
    if (!file) return "";
    int hit = 0;
    while (!hit && fscanf(file, "%63s %63s", name, found) == 2) hit = !strcmp(name, function);
    fclose(file);
    if (!hit) return "";
    if (!strcmp(found, "hang")) for (;;) pause();
    if (!strcmp(found, "crash")) raise(SIGSEGV);
    if (!strcmp(found, "slow")) usleep(200000);
    if (!strcmp(found, "garbage")) { printf("vendor says hello\n"); fflush(stdout); }
    if (!strcmp(found, "once")) unlink(path);
    return found;
}

static int is(const char *a, const char *b) { return !strcmp(a, b); }

/* The return value that a fault stands for, or -1: go on. */
static long refusal(const char *f) {
    if (is(f, "device-error") || is(f, "once")) return DEVICE_ERROR;
    if (is(f, "session-gone")) return SESSION_GONE;
    if (is(f, "unsupported")) return MECHANISM_INVALID;
    if (is(f, "lie")) return OK;
    return -1;
}

#define REAL(index, ...) ((ulong_t (*)(__VA_ARGS__))real->function[index])
#define REFUSE_OR(f, call) do { long r = refusal(f); if (r >= 0) return (ulong_t)r; return call; } while (0)

static ulong_t initialize(void *arguments) {
    REFUSE_OR(fault("C_Initialize"), REAL(INITIALIZE, void *)(arguments));
}

static ulong_t login(ulong_t s, ulong_t user, char *pin, ulong_t length) {
    char path[4096];
    path_of(path, sizeof path, "logins");
    FILE *file = fopen(path, "a");
    if (file) { fputs("login\n", file); fclose(file); }
    const char *f = fault("C_Login");
    if (is(f, "locked")) return PIN_LOCKED;
    REFUSE_OR(f, REAL(LOGIN, ulong_t, ulong_t, char *, ulong_t)(s, user, pin, length));
}

static ulong_t destroy_object(ulong_t s, ulong_t object) {
    REFUSE_OR(fault("C_DestroyObject"), REAL(DESTROY_OBJECT, ulong_t, ulong_t)(s, object));
}

static ulong_t get_attribute(ulong_t s, ulong_t object, attribute_t *a, ulong_t n) {
    const char *f = fault("C_GetAttributeValue");
    ulong_t dated = is(f, "ended") || is(f, "ends") ? END_DATE : is(f, "began") || is(f, "begins") ? START_DATE : 0;
    if (dated && n == 1 && a->type == dated) {
        a->length = 8;
        if (a->value) memcpy(a->value, is(f, "ended") || is(f, "began") ? "20000101" : "29990101", 8);
        return OK;
    }
    ulong_t rv = REAL(GET_ATTRIBUTE, ulong_t, ulong_t, attribute_t *, ulong_t)(s, object, a, n);
    if (is(f, "weaken"))
        for (ulong_t i = 0; i < n; i++)
            if (a[i].type == EXTRACTABLE && a[i].value) *(unsigned char *)a[i].value = 1;
    return rv;
}

static ulong_t set_attribute(ulong_t s, ulong_t object, attribute_t *a, ulong_t n) {
    REFUSE_OR(fault("C_SetAttributeValue"), REAL(SET_ATTRIBUTE, ulong_t, ulong_t, attribute_t *, ulong_t)(s, object, a, n));
}

static ulong_t find_init(ulong_t s, attribute_t *a, ulong_t n) {
    REFUSE_OR(fault("C_FindObjectsInit"), REAL(FIND_INIT, ulong_t, attribute_t *, ulong_t)(s, a, n));
}

static ulong_t encrypt_init(ulong_t s, void *mechanism, ulong_t key) {
    REFUSE_OR(fault("C_EncryptInit"), REAL(ENCRYPT_INIT, ulong_t, void *, ulong_t)(s, mechanism, key));
}

static ulong_t transform(int index, const char *f, ulong_t s, void *in, ulong_t in_n, unsigned char *out, ulong_t *out_n) {
    ulong_t rv = REAL(index, ulong_t, void *, ulong_t, void *, ulong_t *)(s, in, in_n, out, out_n);
    if (is(f, "zeros") && out) { *out_n = 32; memset(out, 0, 32); return OK; }
    if (is(f, "garble") && out && rv == OK) out[0] ^= 1;
    return rv;
}

static ulong_t encrypt(ulong_t s, void *in, ulong_t in_n, unsigned char *out, ulong_t *out_n) {
    const char *f = fault("C_Encrypt");
    REFUSE_OR(f, transform(ENCRYPT, f, s, in, in_n, out, out_n));
}

static ulong_t decrypt(ulong_t s, void *in, ulong_t in_n, unsigned char *out, ulong_t *out_n) {
    const char *f = fault("C_Decrypt");
    REFUSE_OR(f, transform(DECRYPT, f, s, in, in_n, out, out_n));
}

static ulong_t wrap(ulong_t s, void *m, ulong_t kek, ulong_t key, void *out, ulong_t *out_n) {
    REFUSE_OR(fault("C_WrapKey"), REAL(WRAP, ulong_t, void *, ulong_t, ulong_t, void *, ulong_t *)(s, m, kek, key, out, out_n));
}

static ulong_t unwrap(ulong_t s, void *m, ulong_t kek, void *in, ulong_t in_n, attribute_t *a, ulong_t n, ulong_t *key) {
    REFUSE_OR(fault("C_UnwrapKey"),
              REAL(UNWRAP, ulong_t, void *, ulong_t, void *, ulong_t, attribute_t *, ulong_t, ulong_t *)(s, m, kek, in, in_n, a, n, key));
}

static ulong_t generate_random(ulong_t s, unsigned char *out, ulong_t n) {
    const char *f = fault("C_GenerateRandom");
    if (is(f, "zeros")) { memset(out, 0, n); return OK; }
    REFUSE_OR(f, REAL(RANDOM, ulong_t, void *, ulong_t)(s, out, n));
}

ulong_t C_GetFunctionList(list_t **list) {
    if (!real) {
        void *library = dlopen(getenv("FAKE_HSM_MODULE"), RTLD_NOW | RTLD_LOCAL);
        if (!library) return DEVICE_ERROR;
        ulong_t (*get)(list_t **) = (ulong_t (*)(list_t **))dlsym(library, "C_GetFunctionList");
        if (!get || get(&real)) return DEVICE_ERROR;
        ours = *real;
        ours.function[INITIALIZE] = initialize;
        ours.function[GET_FUNCTION_LIST] = C_GetFunctionList;
        ours.function[LOGIN] = login;
        ours.function[DESTROY_OBJECT] = destroy_object;
        ours.function[GET_ATTRIBUTE] = get_attribute;
        ours.function[SET_ATTRIBUTE] = set_attribute;
        ours.function[FIND_INIT] = find_init;
        ours.function[ENCRYPT_INIT] = encrypt_init;
        ours.function[ENCRYPT] = encrypt;
        ours.function[DECRYPT] = decrypt;
        ours.function[WRAP] = wrap;
        ours.function[UNWRAP] = unwrap;
        ours.function[RANDOM] = generate_random;
    }
    *list = &ours;
    return OK;
}
