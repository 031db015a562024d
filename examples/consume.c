/* A consumer of `dmaflow share` that has nothing of dmaflow's but the protocol's documentation (src/share/wire.rs, ring.rs, entry.rs).
 *
 *     cc -O2 -std=gnu11 -Wall -Wextra -o consume examples/consume.c
 *     ./consume cam.sock 100
 *
 * For each frame it prints the sequence number and a sum (64-bit FNV-1a) of the pixels of the first memory plane, or "lost" if the server
 * took the frame back meanwhile. SOCKET may be @NAME. It ends with the server, or after that many frames.
 *
 * A frame that a device still writes comes with a fence, for which it waits with poll(); it prints "fenced" and the sequence number then,
 * or "late" if that takes more than five seconds, and does not look at the frame. It trusts the server that what comes as a fence is one:
 * it polls it and no more. Its own reading is done when it gives a frame back, so it has no fence to send.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <linux/dma-buf.h>
#include <linux/magic.h>

enum { HELLO = 1, WELCOME, FORMAT, BUFFER, END, FENCE };
enum { PUBLISHED = 1, TAKEN, RELEASED };
enum { ENTRIES = 16, WORDS = 7, MAX_MESSAGE = 512, MAX_FDS = 4, MAX_BUFFERS = 64, AREA = 192 + 64 * ENTRIES };

struct entry {
	_Atomic uint64_t state;
	_Atomic uint64_t words[WORDS];
};

struct area {
	_Alignas(64) _Atomic uint64_t head;
	_Alignas(64) _Atomic uint32_t consumer_sleeps;
	_Atomic uint64_t delays;
	_Alignas(64) _Atomic uint32_t server_sleeps;
	_Alignas(64) struct entry entries[ENTRIES];
};
_Static_assert(sizeof(struct area) == AREA && offsetof(struct area, entries) == 192 && offsetof(struct area, delays) == 72,
	       "the documented layout");

/* Buffers of one format; of the memory planes the first is looked at. */
struct generation {
	uint32_t number, count, here;
	uint64_t len;
	int fds[MAX_BUFFERS];
	const uint8_t *maps[MAX_BUFFERS];
};

static struct area *ring;
static int server, bell;
static uint64_t next = 1;
/* Those of frames to come, at the place of their entry in the ring. */
static struct fence {
	uint64_t position;
	int fd;
} fences[ENTRIES];
/* What is used, and what is announced. */
static struct generation now, coming;

static _Noreturn void fail(const char *what)
{
	if (errno)
		perror(what);
	else
		fprintf(stderr, "%s\n", what);
	exit(1);
}

static uint64_t number(const uint8_t *from, int bytes)
{
	uint64_t value = 0;
	while (bytes--)
		value = value << 8 | from[bytes];
	return value;
}

/* The length of the text that a message ends with, from its own length on: all that is left of it. */
static int text(const uint8_t *fields, size_t len, size_t at)
{
	if (len < at + 2 || number(fields + at, 2) != len - at - 2)
		fail("a text has another length than it says");
	return (int)(len - at - 2);
}

/* What another process says may be meant for the terminal: of it the printable bytes are printed. */
static void print(const void *from, int len)
{
	const uint8_t *bytes = from;
	for (int i = 0; i < len; i++)
		putchar(bytes[i] >= ' ' && bytes[i] < 127 ? bytes[i] : '?');
}

/* Whether memory keeps the size that it has: what could be cut off would end this process with SIGBUS. */
static bool stays(int fd, int seals)
{
	int has = fcntl(fd, F_GET_SEALS);
	return has >= 0 && (has & seals) == seals;
}

static void forget(struct generation *old)
{
	for (uint32_t i = 0; i < old->here; i++) {
		munmap((void *)old->maps[i], old->len);
		close(old->fds[i]);
	}
	memset(old, 0, sizeof *old);
}

static void on_format(const uint8_t *fields, size_t len)
{
	if (len < 60)
		fail("a format is too short");
	unsigned colour = fields[58], memory = fields[59];
	if (len != 60 + 12 * colour + 8 * memory || memory < 1 || memory > MAX_FDS)
		fail("a format has another length than it says");
	forget(&coming);
	coming.number = number(fields, 4);
	coming.count = number(fields + 4, 4);
	coming.len = number(fields + 60 + 12 * colour, 8);
	if (coming.count < 1 || coming.count > MAX_BUFFERS)
		fail("a format has too many buffers");
	printf("format %u: %u buffers of %ux%u, ", coming.number, coming.count, (unsigned)number(fields + 40, 4), (unsigned)number(fields + 44, 4));
	print(fields + 32, 4);
	printf(", each frame for %u us\n", (unsigned)number(fields + 8, 8));
}

static void on_buffer(const uint8_t *fields, size_t len, int fd)
{
	if (len != 16 || fd < 0 || number(fields, 4) != coming.number || number(fields + 4, 4) != coming.here || coming.here >= coming.count)
		fail("a buffer comes out of turn");
	struct statfs where;
	struct stat is;
	if (fstatfs(fd, &where) || fstat(fd, &is))
		fail("a buffer cannot be looked at");
	if (where.f_type != DMA_BUF_MAGIC && !stays(fd, F_SEAL_SHRINK))
		fail("a buffer is neither a dma-buf nor a memfd that is sealed against shrinking");
	if (is.st_ino != number(fields + 8, 8) || lseek(fd, 0, SEEK_END) < (off_t)coming.len)
		fail("a buffer is another than is said, or smaller");
	const void *map = mmap(NULL, coming.len, PROT_READ, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		fail("a buffer cannot be mapped");
	/* It is for reading: what others see cannot be changed through it. */
	void *writable = mmap(NULL, coming.len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (coming.here == 0)
		printf("writable %s\n", writable == MAP_FAILED && errno == EACCES ? "no" : "yes");
	if (writable != MAP_FAILED)
		munmap(writable, coming.len);
	coming.fds[coming.here] = fd;
	coming.maps[coming.here++] = map;
}

/* Of an earlier frame there may be one at this place, which was skipped. */
static void on_fence(const uint8_t *fields, size_t len, int fd)
{
	uint64_t position = len == 8 ? number(fields, 8) : 0;
	struct fence *place = &fences[position % ENTRIES];
	if (fd < 0 || position <= place->position)
		fail("a fence comes out of turn");
	if (place->fd > 0)
		close(place->fd);
	place->position = position;
	place->fd = fd;
}

/* Takes one message, if there is one; false if there is none. */
static bool hear(void)
{
	uint8_t bytes[MAX_MESSAGE];
	union {
		char space[CMSG_SPACE(sizeof(int) * MAX_FDS)];
		struct cmsghdr align;
	} control;
	struct iovec part = { bytes, sizeof bytes };
	struct msghdr head = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
	ssize_t len;
	int resets = 0;
	do
		len = recvmsg(server, &head, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	/* A server that has hung up without reading all resets once: what it sent comes next. */
	while (len < 0 && (errno == EINTR || (errno == ECONNRESET && resets++ == 0)));
	if (len < 0 && errno == EAGAIN)
		return false;
	if (len < 0)
		fail("the socket");
	errno = 0;
	if (len == 0) {
		printf("the server is gone\n");
		exit(0);
	}
	if (len < 8 || memcmp(bytes, "dmaf", 4) || number(bytes + 4, 2) != 1 || (head.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
		fail("what came is no message");
	int fds[MAX_FDS] = { -1, -1, -1, -1 }, count = 0;
	struct cmsghdr *rights = CMSG_FIRSTHDR(&head);
	if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS) {
		count = (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(fds, CMSG_DATA(rights), sizeof(int) * count);
	}
	const uint8_t *fields = bytes + 8;
	len -= 8;
	uint64_t kind = number(bytes + 6, 2);
	if (kind != WELCOME && kind != BUFFER && kind != FENCE && count)
		fail("descriptors come with a message that has none");
	struct stat area;
	int said;
	switch (kind) {
	case WELCOME:
		said = text(fields, len, 8);
		if (count != 2 || ring)
			fail("the welcome is not right");
		/* The size after the seals: until they are there, it changes. */
		if (!stays(fds[0], F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) || fstat(fds[0], &area) || area.st_size < (off_t)sizeof *ring)
			fail("the ring is not sealed as it must be, or too small");
		ring = mmap(NULL, sizeof *ring, PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
		if (ring == MAP_FAILED)
			fail("the ring cannot be mapped");
		close(fds[0]);
		bell = fds[1];
		printf("welcome: %u frames at a time, of ", (unsigned)number(fields, 4));
		print(fields + 10, said);
		putchar('\n');
		break;
	case FORMAT:
		on_format(fields, len);
		break;
	case BUFFER:
		on_buffer(fields, len, fds[0]);
		for (int i = 1; i < count; i++)
			close(fds[i]);
		break;
	case FENCE:
		if (count != 1)
			fail("a fence has one descriptor");
		on_fence(fields, len, fds[0]);
		break;
	case END:
		said = text(fields, len, 2);
		printf("the server ends: reason %u, ", (unsigned)number(fields, 2));
		print(fields + 4, said);
		putchar('\n');
		exit(number(fields, 2) == 0 ? 0 : 1);
	default:
		fail("a message is of another kind");
	}
	return true;
}

static bool holds(uint64_t position)
{
	atomic_thread_fence(memory_order_acquire);
	return atomic_load(&ring->entries[position % ENTRIES].state) == (position << 3 | TAKEN);
}

/* How late frames are taken, for whoever looks at the server's table. */
static void tell_delay(uint64_t published_us)
{
	static uint64_t frames, sum;
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	uint64_t us = time.tv_sec * UINT64_C(1000000) + time.tv_nsec / 1000;
	sum += us > published_us ? us - published_us : 0;
	atomic_store_explicit(&ring->delays, ++frames << 40 | (sum & ((UINT64_C(1) << 40) - 1)), memory_order_relaxed);
}

/* The next frame's data, and its position; 0 if there is none. */
static uint64_t take(uint64_t words[WORDS])
{
	uint64_t head = atomic_load_explicit(&ring->head, memory_order_acquire);
	if (head > ENTRIES && next < head - ENTRIES)
		next = head - ENTRIES;
	while (next < head) {
		uint64_t position = next++;
		struct entry *entry = &ring->entries[position % ENTRIES];
		uint64_t published = position << 3 | PUBLISHED;
		if (!atomic_compare_exchange_strong_explicit(&entry->state, &published, position << 3 | TAKEN, memory_order_acquire,
							     memory_order_relaxed))
			continue;
		for (int i = 0; i < WORDS; i++)
			words[i] = atomic_load_explicit(&entry->words[i], memory_order_relaxed);
		if (holds(position)) {
			tell_delay(words[6]);
			return position;
		}
	}
	return 0;
}

static void release(uint64_t position)
{
	uint64_t taken = position << 3 | TAKEN;
	/* One that was taken back is not given back, nor rung for. */
	if (!atomic_compare_exchange_strong_explicit(&ring->entries[position % ENTRIES].state, &taken, position << 3 | RELEASED,
						     memory_order_release, memory_order_relaxed))
		return;
	atomic_thread_fence(memory_order_seq_cst);
	if (!atomic_load(&ring->server_sleeps) || !atomic_exchange(&ring->server_sleeps, 0))
		return;
	/* One that is gone says so by its socket. */
	while (send(bell, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && errno == EINTR)
		;
}

/* Waits until the frame is written. */
static bool acquire(uint64_t position, unsigned sequence)
{
	struct fence *place = &fences[position % ENTRIES];
	while (place->position != position)
		if (!hear())
			fail("the fence of a frame has not come");
	struct pollfd fd = { .fd = place->fd, .events = POLLIN };
	bool written = poll(&fd, 1, 5000) == 1;
	printf("%s %u\n", written ? "fenced" : "late", sequence);
	close(place->fd);
	place->fd = 0;
	return written;
}

static void look_at(uint64_t position, const uint64_t words[WORDS])
{
	uint32_t generation = words[0], index = words[0] >> 32;
	if (generation != now.number) {
		while (generation != coming.number || coming.here < coming.count)
			if (!hear())
				fail("a frame is of a format that was not announced");
		forget(&now);
		now = coming;
		memset(&coming, 0, sizeof coming);
	}
	if (index >= now.count)
		fail("a frame is in a buffer that is not there");
	if (words[2] >> 37 & 1 && !acquire(position, words[2]))
		return;
	uint64_t used = (uint32_t)words[3], sum = 0xcbf29ce484222325;
	if (used > now.len)
		used = now.len;
	/* A memfd has no such call, and needs none. */
	struct dma_buf_sync sync = { DMA_BUF_SYNC_START | DMA_BUF_SYNC_READ };
	ioctl(now.fds[index], DMA_BUF_IOCTL_SYNC, &sync);
	for (uint64_t i = 0; i < used; i++)
		sum = (sum ^ now.maps[index][i]) * 0x100000001b3;
	sync.flags = DMA_BUF_SYNC_END | DMA_BUF_SYNC_READ;
	ioctl(now.fds[index], DMA_BUF_IOCTL_SYNC, &sync);
	if (holds(position))
		printf("frame %u %016llx\n", (unsigned)words[2], (unsigned long long)sum);
	else
		printf("lost %u\n", (unsigned)words[2]);
}

int main(int argc, char **argv)
{
	if (argc < 2 || argc > 3) {
		fprintf(stderr, "usage: consume SOCKET [FRAMES]\n");
		return 2;
	}
	long frames = argc > 2 ? atol(argv[2]) : -1;
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	size_t len = strlen(argv[1]);
	if (len >= sizeof address.sun_path)
		fail("the socket's name is too long");
	memcpy(address.sun_path, argv[1], len);
	if (address.sun_path[0] == '@')
		address.sun_path[0] = 0;
	server = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	/* The name is part of the address as far as it goes, without a zero at its end. */
	if (server < 0 || connect(server, (struct sockaddr *)&address, offsetof(struct sockaddr_un, sun_path) + len) < 0)
		fail(argv[1]);
	static const uint8_t hello[] = "dmaf\1\0\1\0\0\0\0\0\7\0consume";
	if (send(server, hello, sizeof hello - 1, MSG_NOSIGNAL) < 0)
		fail("hello");
	while (!ring || !coming.count || coming.here < coming.count) {
		struct pollfd fd = { .fd = server, .events = POLLIN };
		poll(&fd, 1, -1);
		hear();
	}
	while (frames) {
		uint64_t words[WORDS], position = take(words);
		if (position) {
			look_at(position, words);
			release(position);
			if (frames > 0)
				frames--;
			continue;
		}
		fflush(stdout);
		/* Say so, look once more, and sleep. */
		atomic_store(&ring->consumer_sleeps, 1);
		atomic_thread_fence(memory_order_seq_cst);
		if (atomic_load_explicit(&ring->head, memory_order_acquire) > next) {
			atomic_store(&ring->consumer_sleeps, 0);
			continue;
		}
		struct pollfd fds[] = { { .fd = server, .events = POLLIN }, { .fd = bell, .events = POLLIN } };
		uint8_t rings[64];
		poll(fds, 2, -1);
		if (fds[1].revents)
			recv(bell, rings, sizeof rings, MSG_DONTWAIT);
		if (fds[0].revents)
			hear();
	}
	return 0;
}
