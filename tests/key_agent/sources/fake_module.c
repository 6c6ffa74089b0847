/* A vendor's PKCS#11 module as it may misbehave: SoftHSM2 with faults.
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
 *   session-count   CKR_SESSION_COUNT        dies            CKR_DEVICE_ERROR by everything until C_Finalize
 *   dies-once       the same, and deletes the faults
 * $FAKE_HSM/modes says what the HSM is like, a word a line:
 *   iv-in-place     GCM takes 12 zero bytes only and writes its IV over them
 *   iv-appended-12, iv-appended-16           GCM takes no IV and appends its own to the tag
 *   read-only       no read-write sessions   stuck           a failed operation stays alive in its session
 *   cached          keys are listed once, after C_Initialize, and one login lasts
 *   locking         the third wrong PIN locks: CKR_PIN_LOCKED from then on
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
typedef struct { ulong_t type; void *parameter; ulong_t length; } mechanism_t;
typedef struct { unsigned char *iv; ulong_t iv_n, iv_bits; void *aad; ulong_t aad_n, tag_bits; } gcm_t;
typedef struct { unsigned char version[2]; void *function[68]; } list_t; /* CK_FUNCTION_LIST 2.40 */

enum { INITIALIZE = 0, FINALIZE = 1, GET_FUNCTION_LIST = 3, OPEN_SESSION = 12, CLOSE_SESSION = 13, LOGIN = 18, LOGOUT = 19, DESTROY_OBJECT = 22, GET_ATTRIBUTE = 24, SET_ATTRIBUTE = 25,
       FIND_INIT = 26, FIND = 27, FIND_FINAL = 28, ENCRYPT_INIT = 29, ENCRYPT = 30, DECRYPT_INIT = 33,
       DECRYPT = 34, SIGN = 43, WRAP = 60, UNWRAP = 61, DERIVE = 62, RANDOM = 64 };
enum { OK = 0, DEVICE_ERROR = 0x30, MECHANISM_INVALID = 0x70, PARAM_INVALID = 0x71, OPERATION_ACTIVE = 0x90,
       PIN_INCORRECT = 0xA0, PIN_LOCKED = 0xA4, SESSION_COUNT = 0xB1, SESSION_GONE = 0xB3, WRITE_PROTECTED = 0xE2,
       ALREADY_LOGGED_IN = 0x100, TOO_SMALL = 0x150, READ_WRITE = 2, AES_GCM = 0x1087,
       START_DATE = 0x110, END_DATE = 0x111, EXTRACTABLE = 0x162 };

static list_t *real, ours;
static int is_dead;              /* "dies" */
static ulong_t stuck_session;    /* "stuck" */
static ulong_t held_session;     /* "cached": it keeps the login */
static unsigned char made_iv[16]; /* "iv-appended": of the operation that is running */
static ulong_t made_iv_n;

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
    if (!strcmp(found, "once") || !strcmp(found, "dies-once")) unlink(path);
    return found;
}

static int is(const char *a, const char *b) { return !strcmp(a, b); }

static int has_mode(const char *wanted) {
    static char word[64];
    char path[4096];
    path_of(path, sizeof path, "modes");
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    int hit = 0;
    while (!hit && fscanf(file, "%63s", word) == 1) hit = is(word, wanted);
    fclose(file);
    return hit;
}

/* The return value that a fault stands for, or -1: go on. */
static long refusal(const char *f) {
    if (is(f, "dies") || is(f, "dies-once")) is_dead = 1;
    if (is_dead) return DEVICE_ERROR;
    if (is(f, "session-count")) return SESSION_COUNT;
    if (is(f, "device-error") || is(f, "once")) return DEVICE_ERROR;
    if (is(f, "session-gone")) return SESSION_GONE;
    if (is(f, "unsupported")) return MECHANISM_INVALID;
    if (is(f, "lie")) return OK;
    return -1;
}

#define REAL(index, ...) ((ulong_t (*)(__VA_ARGS__))real->function[index])
#define REFUSE_OR(f, call) do { long r = refusal(f); if (r >= 0) return (ulong_t)r; return call; } while (0)

static void forget(void);

static ulong_t initialize(void *arguments) {
    forget();
    REFUSE_OR(fault("C_Initialize"), REAL(INITIALIZE, void *)(arguments));
}

static ulong_t finalize(void *reserved) {
    is_dead = 0;
    stuck_session = held_session = 0;
    return REAL(FINALIZE, void *)(reserved);
}

static ulong_t open_session(ulong_t slot, ulong_t flags, void *application, void *notify, ulong_t *session) {
    const char *f = fault("C_OpenSession");
    if (has_mode("read-only") && flags & READ_WRITE) return WRITE_PROTECTED;
    if (has_mode("cached") && !held_session)
        REAL(OPEN_SESSION, ulong_t, ulong_t, void *, void *, ulong_t *)(slot, flags, 0, 0, &held_session);
    REFUSE_OR(f, REAL(OPEN_SESSION, ulong_t, ulong_t, void *, void *, ulong_t *)(slot, flags, application, notify, session));
}

static ulong_t close_session(ulong_t s) {
    if (s == stuck_session) stuck_session = 0;
    return REAL(CLOSE_SESSION, ulong_t)(s);
}

static ulong_t logout(ulong_t s) { return has_mode("cached") ? OK : REAL(LOGOUT, ulong_t)(s); }

/* Wrong PINs so far, this one included if *more*. */
static int wrong_pins(int more) {
    char path[4096];
    path_of(path, sizeof path, "wrong-pins");
    FILE *file = fopen(path, more ? "a+" : "r");
    if (!file) return 0;
    if (more) { fputc('x', file); fflush(file); }
    fseek(file, 0, SEEK_END);
    long count = ftell(file);
    fclose(file);
    return (int)count;
}

static ulong_t login(ulong_t s, ulong_t user, char *pin, ulong_t length) {
    char path[4096];
    path_of(path, sizeof path, "logins");
    FILE *file = fopen(path, "a");
    if (file) { fputs("login\n", file); fclose(file); }
    const char *f = fault("C_Login");
    if (is(f, "locked")) return PIN_LOCKED;
    int is_locking = has_mode("locking");
    if (is_locking && wrong_pins(0) >= 3) return PIN_LOCKED;
    long r = refusal(f);
    if (r >= 0) return (ulong_t)r;
    ulong_t rv = REAL(LOGIN, ulong_t, ulong_t, char *, ulong_t)(s, user, pin, length);
    if (rv == ALREADY_LOGGED_IN && has_mode("cached")) return OK;
    if (rv == PIN_INCORRECT && is_locking && wrong_pins(1) >= 3) return PIN_LOCKED;
    return rv;
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

/* "cached": what a search found first is what it finds ever after, until C_Initialize. */
enum { SEARCHES = 64, HITS = 16 };
static struct { ulong_t hash, hits[HITS], count; } searches[SEARCHES];
static ulong_t searched, replaying, replayed;

static ulong_t hash_of(attribute_t *a, ulong_t n) {
    ulong_t hash = 14695981039346656037UL;
    for (ulong_t i = 0; i < n; i++) {
        hash = (hash ^ a[i].type) * 1099511628211UL;
        for (ulong_t j = 0; j < a[i].length; j++) hash = (hash ^ ((unsigned char *)a[i].value)[j]) * 1099511628211UL;
    }
    return hash;
}

static void forget(void) { searched = replaying = 0; }

static ulong_t find_init(ulong_t s, attribute_t *a, ulong_t n) {
    const char *f = fault("C_FindObjectsInit");
    if (s == stuck_session) return OPERATION_ACTIVE;
    if (!has_mode("cached"))
        REFUSE_OR(f, REAL(FIND_INIT, ulong_t, attribute_t *, ulong_t)(s, a, n));
    ulong_t hash = hash_of(a, n), i = 0;
    while (i < searched && searches[i].hash != hash) i++;
    if (i == searched) {
        if (searched == SEARCHES) return DEVICE_ERROR;
        ulong_t rv = REAL(FIND_INIT, ulong_t, attribute_t *, ulong_t)(s, a, n);
        if (rv) return rv;
        searches[i].hash = hash;
        REAL(FIND, ulong_t, ulong_t *, ulong_t, ulong_t *)(s, searches[i].hits, HITS, &searches[i].count);
        REAL(FIND_FINAL, ulong_t)(s);
        searched++;
    }
    replaying = i + 1;
    replayed = 0;
    return OK;
}

static ulong_t find(ulong_t s, ulong_t *objects, ulong_t most, ulong_t *count) {
    if (!replaying) return REAL(FIND, ulong_t, ulong_t *, ulong_t, ulong_t *)(s, objects, most, count);
    for (*count = 0; *count < most && replayed < searches[replaying - 1].count; replayed++)
        objects[(*count)++] = searches[replaying - 1].hits[replayed];
    return OK;
}

static ulong_t find_final(ulong_t s) {
    if (!replaying) return REAL(FIND_FINAL, ulong_t)(s);
    replaying = 0;
    return OK;
}

static int is_zero(const unsigned char *bytes, ulong_t n) {
    for (ulong_t i = 0; i < n; i++) if (bytes[i]) return 0;
    return 1;
}

static ulong_t encrypt_init(ulong_t s, mechanism_t *m, ulong_t key) {
    const char *f = fault("C_EncryptInit");
    made_iv_n = 0;
    if (m->type == AES_GCM) {
        gcm_t *given = m->parameter;
        ulong_t n = has_mode("iv-appended-12") ? 12 : has_mode("iv-appended-16") ? 16 : 0;
        if (has_mode("iv-in-place")) {
            if (given->iv_n != 12 || !is_zero(given->iv, 12)) return PARAM_INVALID;
            REAL(RANDOM, ulong_t, void *, ulong_t)(s, given->iv, 12);
        } else if (n) {
            if (given->iv || given->iv_n) return PARAM_INVALID;
            REAL(RANDOM, ulong_t, void *, ulong_t)(s, made_iv, n);
            gcm_t with_iv = *given;
            with_iv.iv = made_iv;
            with_iv.iv_n = n;
            with_iv.iv_bits = 8 * n;
            mechanism_t ours_m = { AES_GCM, &with_iv, sizeof with_iv };
            ulong_t rv = REAL(ENCRYPT_INIT, ulong_t, void *, ulong_t)(s, &ours_m, key);
            if (rv == OK) made_iv_n = n;
            return rv;
        }
    }
    REFUSE_OR(f, REAL(ENCRYPT_INIT, ulong_t, void *, ulong_t)(s, m, key));
}

static ulong_t decrypt_init(ulong_t s, void *mechanism, ulong_t key) {
    const char *f = fault("C_DecryptInit");
    if (s == stuck_session) return OPERATION_ACTIVE;
    REFUSE_OR(f, REAL(DECRYPT_INIT, ulong_t, void *, ulong_t)(s, mechanism, key));
}

static ulong_t transform(int index, const char *f, ulong_t s, void *in, ulong_t in_n, unsigned char *out, ulong_t *out_n) {
    ulong_t rv = REAL(index, ulong_t, void *, ulong_t, void *, ulong_t *)(s, in, in_n, out, out_n);
    if (is(f, "zeros") && out) { *out_n = 32; memset(out, 0, 32); return OK; }
    if (is(f, "garble") && out && rv == OK) out[0] ^= 1;
    if (index == DECRYPT && rv != OK && rv != TOO_SMALL && has_mode("stuck")) stuck_session = s;
    return rv;
}

static ulong_t encrypt(ulong_t s, void *in, ulong_t in_n, unsigned char *out, ulong_t *out_n) {
    const char *f = fault("C_Encrypt");
    if (made_iv_n) {
        ulong_t room = *out_n, need = in_n + 16 + made_iv_n;
        *out_n = need;
        if (!out) return OK;
        if (room < need) return TOO_SMALL;
        ulong_t body = room;
        ulong_t rv = REAL(ENCRYPT, ulong_t, void *, ulong_t, void *, ulong_t *)(s, in, in_n, out, &body);
        if (rv) return rv;
        memcpy(out + body, made_iv, made_iv_n);
        *out_n = body + made_iv_n;
        made_iv_n = 0;
        return OK;
    }
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

static ulong_t derive(ulong_t s, void *m, ulong_t key, attribute_t *a, ulong_t n, ulong_t *made) {
    REFUSE_OR(fault("C_DeriveKey"), REAL(DERIVE, ulong_t, void *, ulong_t, attribute_t *, ulong_t, ulong_t *)(s, m, key, a, n, made));
}

static ulong_t sign(ulong_t s, void *in, ulong_t in_n, unsigned char *out, ulong_t *out_n) {
    const char *f = fault("C_Sign");
    REFUSE_OR(f, transform(SIGN, f, s, in, in_n, out, out_n));
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
        ours.function[FINALIZE] = finalize;
        ours.function[OPEN_SESSION] = open_session;
        ours.function[CLOSE_SESSION] = close_session;
        ours.function[LOGIN] = login;
        ours.function[LOGOUT] = logout;
        ours.function[DESTROY_OBJECT] = destroy_object;
        ours.function[GET_ATTRIBUTE] = get_attribute;
        ours.function[SET_ATTRIBUTE] = set_attribute;
        ours.function[FIND_INIT] = find_init;
        ours.function[FIND] = find;
        ours.function[FIND_FINAL] = find_final;
        ours.function[ENCRYPT_INIT] = encrypt_init;
        ours.function[DECRYPT_INIT] = decrypt_init;
        ours.function[ENCRYPT] = encrypt;
        ours.function[DECRYPT] = decrypt;
        ours.function[WRAP] = wrap;
        ours.function[UNWRAP] = unwrap;
        ours.function[DERIVE] = derive;
        ours.function[SIGN] = sign;
        ours.function[RANDOM] = generate_random;
    }
    *list = &ours;
    return OK;
}
