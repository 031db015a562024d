//! What anybody may send and write, at random: to a server, and to a receiver. `ci/fuzz` tries many more cases than a plain test does.

pub(super) mod heap;

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use super::area::SharedArea;
use super::bell::Bell;
use super::entry::Entry;
use super::join::{ANSWER, Hello, Joining, Wish};
use super::listener::Listener;
use super::ring::{self, Area, WORDS};
use super::socket::{Place, Received, Socket};
use super::wire::Message;
use super::*;
use crate::endpoint::{Ready, Sink, Source};
use crate::error::Kind;
use crate::format::{Format, Layout};
use crate::frame::{Buffer, Frame, FrameMeta, Slots, SlotsArc};
use crate::memory::{Access, Allocator, Mapping, Memory};

/// The packets to begin with: those of the corpus.
fn corpus() -> Vec<Vec<u8>> {
    let bytes = |hex: &str| {
        let digits = hex.as_bytes().chunks(2);
        digits
            .map(|two| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap())
            .collect()
    };
    include_str!("../../ci/corpus/share.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(": "))
        .map(|(_, hex)| bytes(hex))
        .collect()
}

/// One of the corpus, with a few bytes changed or its end cut off or grown; or anything.
fn packets() -> impl Strategy<Value = Vec<u8>> {
    let bytes = prop_oneof![Just(0), Just(1), Just(0x7f), Just(0xff), any::<u8>()];
    let changes = prop::collection::vec((any::<Index>(), bytes), 0..4);
    let ends = prop_oneof![4 => Just(None), 1 => any::<Index>().prop_map(Some)];
    let changed = (prop::sample::select(corpus()), changes, ends, prop_oneof![4 => Just(0usize), 1 => 0usize..600]);
    let changed = changed.prop_map(|(mut packet, changes, end, more)| {
        for (at, byte) in changes {
            let at = at.index(packet.len());
            packet[at] = byte;
        }
        packet.truncate(end.map_or(packet.len(), |end| end.index(packet.len())));
        packet.resize(packet.len() + more, 0);
        packet
    });
    prop_oneof![6 => changed, 1 => prop::collection::vec(any::<u8>(), 0..600)]
}

/// What may lie in a ring's words: numbers as they are used there, and others.
fn numbers() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..400,
        Just(u64::MAX),
        (1u64..40, 0u64..8).prop_map(|(position, stage)| position << 3 | stage)
    ]
}

fn run<S: Strategy>(cases: S, test: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = Config { source_file: Some(file!()), ..Config::default() };
    TestRunner::new(config).run(&cases, test).unwrap();
}

fn send(socket: &Socket, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let fds: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    // The other side has hung up perhaps.
    let _ = sendmsg::<UnixAddr>(socket.as_fd().as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
}

/// A pipe's writing end to send, and its reading end, which says whether all of those are closed.
fn tell_tale() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK).unwrap();
    (reader, writer)
}

/// At once or in a moment: who looks at the descriptors of this process by /proc, as `dmaflow bufs` does, has each of them for that long.
fn is_closed(reader: &OwnedFd) -> bool {
    let _ = poll(&mut [PollFd::new(reader.as_fd(), PollFlags::empty())], 5000u16);
    nix::unistd::read(reader, &mut [0]) == Ok(0)
}

/// A source without a clock: as many frames as are asked for.
struct Still {
    buffers: Vec<Buffer>,
    slots: SlotsArc,
    sequence: u32,
}

impl Still {
    fn new(count: u32) -> Still {
        let layout = Layout::packed(Format::parse("GREY").unwrap().0, (64, 64), 1).unwrap();
        let buffer = |_| Buffer::new(layout, vec![Allocator::Plain.allocate(4096).unwrap()], &[4096]).unwrap();
        Still { buffers: (0..count).map(buffer).collect(), slots: Slots::new(count), sequence: 0 }
    }

    fn present(&mut self, server: &mut Server) -> u32 {
        self.slots.take_free().for_each(|slot| slot.queued());
        let lease = (0..self.buffers.len() as u32).find_map(|slot| Slots::dequeued(&self.slots, slot));
        let lease = lease.expect("the source starves");
        self.sequence += 1;
        let meta = FrameMeta { sequence: self.sequence, ..FrameMeta::default() };
        let buffer = self.buffers[lease.index() as usize].clone();
        server.present(Frame::new(buffer, meta, lease)).unwrap();
        self.sequence
    }
}

/// The most that a packet makes who hears it take of the heap, in bytes: the longest text (`wire.rs`).
const OF_A_PACKET: usize = 256;

/// The most that a server takes of the heap for what it finds in one look, in bytes: a connection becomes a consumer, with the messages that
/// are sent to it.
const OF_A_SERVER: usize = 16 << 10;

/// The same of a receiver: all that waits in its socket (some ten messages, `net.unix.max_dgram_qlen`), or the buffers of a generation
/// that it follows.
const OF_A_RECEIVER: usize = 32 << 10;

/// Calls what must not take more of the heap than that.
fn within<R>(bytes: usize, call: impl FnOnce() -> R) -> Result<R, TestCaseError> {
    let (result, most) = heap::most(call);
    prop_assert!(most <= bytes, "it took {most} bytes");
    Ok(result)
}

/// Whatever a packet holds, it is decoded in a little memory.
#[test]
fn packets_of_all_sorts() {
    run(packets(), |bytes| {
        let decoded = within(OF_A_PACKET, || Message::decode(&bytes))?;
        prop_assert!(decoded.is_err() || bytes.len() <= wire::MAX_MESSAGE);
        Ok(())
    });
}

/// What a consumer does.
#[derive(Clone, Debug)]
enum Act {
    Send(Vec<u8>, usize),
    Hear,
    Write(usize, u64),
    Ring,
    Take,
    Release(u64),
    Sleep,
    Frame,
}

fn acts() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (packets(), prop_oneof![3 => Just(0usize), 1 => 1usize..6]).prop_map(|(bytes, fds)| Act::Send(bytes, fds)),
        2 => Just(Act::Hear),
        3 => (0usize..size_of::<Area>() / 4, numbers()).prop_map(|(place, number)| Act::Write(place * 4, number)),
        1 => Just(Act::Ring),
        2 => Just(Act::Take),
        1 => (0u64..40).prop_map(Act::Release),
        1 => Just(Act::Sleep),
        3 => Just(Act::Frame),
    ]
}

/// What a consumer has of its server.
#[derive(Default)]
struct Theirs {
    area: Option<(SharedArea, Mapping)>,
    consumer: Option<ring::Consumer<SharedArea>>,
    bell: Option<Bell>,
}

impl Theirs {
    fn hear(&mut self, socket: &Socket) {
        while let Ok(Received::Message(message, fds)) = socket.receive(true) {
            let (Message::Welcome(_), Ok([ring, bell])) = (message, <[OwnedFd; 2]>::try_from(fds)) else { continue };
            let area = SharedArea::open(ring.as_fd()).unwrap();
            let mapping = Mapping::new(ring.as_fd(), size_of::<Area>(), Access::ReadWrite).unwrap();
            self.consumer = Some(ring::Consumer::new(area.clone()));
            self.area = Some((area, mapping));
            self.bell = Some(Bell::from_fd(bell).unwrap());
        }
    }
}

/// A consumer that does anything in any order, with the protocol and beside it: it is served or disconnected, the others get every frame,
/// and no descriptor stays.
#[test]
fn consumers_of_all_sorts() {
    let at = format!("@dmaflow-fuzz-server-{}", std::process::id());
    let mut source = Still::new(6);
    let lease = Some(std::time::Duration::from_secs(3600));
    let mut server = Server::bind(&at, ServerRequest { lease, ..ServerRequest::default() }).unwrap();
    server.join(source.buffers[0].layout(), None, &source.buffers).unwrap();
    let connecting = std::thread::spawn({
        let at = at.clone();
        move || Receiver::connect(&at, "good")
    });
    while !connecting.is_finished() {
        server.dispatch().unwrap();
    }
    let mut good = connecting.join().unwrap().unwrap();
    // Even a case that fails leaves them to the next.
    source.present(&mut server);
    let all = std::cell::RefCell::new((source, server));
    let good = {
        drop(good.try_next(Ready::FRAME).unwrap());
        std::cell::RefCell::new(good)
    };
    let hello = Message::Hello { writable: false, name: "x".into() }.encode();
    run((any::<bool>(), prop::collection::vec(acts(), 1..12)), |(greets, acts)| {
        let (source, server) = &mut *all.borrow_mut();
        let good = &mut *good.borrow_mut();
        let (reader, writer) = tell_tale();
        let socket = Socket::connect(&Place::parse(&at)).unwrap();
        let mut theirs = Theirs::default();
        if greets {
            send(&socket, &hello, &[]);
            server.dispatch().unwrap();
            server.dispatch().unwrap();
            theirs.hear(&socket);
        }
        for act in acts {
            match act {
                Act::Send(bytes, fds) => send(&socket, &bytes, &vec![writer.as_fd(); fds]),
                Act::Hear => theirs.hear(&socket),
                Act::Write(at, number) => {
                    if let Some((_, mapping)) = &mut theirs.area {
                        let bytes = number.to_ne_bytes();
                        let room = (size_of::<Area>() - at).min(bytes.len());
                        mapping.write(at, &bytes[..room]);
                    }
                }
                Act::Ring => drop(theirs.bell.as_ref().map(Bell::ring)),
                Act::Take => drop(theirs.consumer.as_mut().map(ring::Consumer::take)),
                Act::Release(position) => drop(theirs.area.as_ref().map(|(area, _)| area.release(position))),
                Act::Sleep => drop(theirs.consumer.as_mut().map(ring::Consumer::sleep)),
                Act::Frame => {
                    let sequence = source.present(server);
                    let frame = good.try_next(Ready::FRAME).unwrap();
                    prop_assert_eq!(frame.map(|frame| frame.meta().sequence), Some(sequence));
                    good.recycle().unwrap();
                }
            }
            within(OF_A_SERVER, || server.dispatch())?.unwrap();
            prop_assert!(server.consumers().len() <= 2);
        }
        drop((socket, theirs, writer));
        for _ in 0..4 {
            server.dispatch().unwrap();
        }
        prop_assert!(is_closed(&reader), "a descriptor is still open");
        prop_assert_eq!(server.consumers().len(), 1);
        // Nothing is kept for one that has gone.
        source.present(server);
        drop(good.try_next(Ready::FRAME).unwrap());
        good.recycle().unwrap();
        source.present(server);
        prop_assert!(source.slots.counts().dequeued <= 1, "{}", source.slots.counts());
        drop(good.try_next(Ready::FRAME).unwrap());
        Ok(())
    });
    // It has come as far as that.
    let (_, server) = all.into_inner();
    let gone: Vec<_> = server.departures().map(|gone| gone.at_fault).collect();
    assert!(gone.contains(&true) && gone.contains(&false), "{gone:?}");
}

/// What a server does, and what the program does that listens to it.
#[derive(Clone, Debug)]
enum Deed {
    Send(Vec<u8>, Vec<u8>),
    /// A format of this generation with so many buffers, in order.
    Format(u32, u32),
    Publish(Box<[u64; WORDS]>),
    /// A frame in a buffer of a generation.
    Frame(u32, u32),
    Write(usize, u64),
    Ring,
    HangUp,
    Next,
    Follow,
    Drop,
}

fn deeds() -> impl Strategy<Value = Deed> {
    prop_oneof![
        2 => (packets(), prop::collection::vec(0u8..4, 0..5)).prop_map(|(bytes, fds)| Deed::Send(bytes, fds)),
        1 => (0u32..4, 1u32..3).prop_map(|(generation, buffers)| Deed::Format(generation, buffers)),
        1 => prop::array::uniform7(numbers()).prop_map(|words| Deed::Publish(Box::new(words))),
        4 => (0u32..4, 0u32..4).prop_map(|(generation, buffer)| Deed::Frame(generation, buffer)),
        2 => (0usize..size_of::<Area>() / 4, numbers()).prop_map(|(place, number)| Deed::Write(place * 4, number)),
        1 => Just(Deed::Ring),
        1 => Just(Deed::HangUp),
        4 => Just(Deed::Next),
        2 => Just(Deed::Follow),
        1 => Just(Deed::Drop),
    ]
}

/// A server that is none.
struct Liar {
    socket: Option<Socket>,
    ring: ring::Server<SharedArea, ()>,
    mapping: Mapping,
    bell: Bell,
    writer: OwnedFd,
}

impl Liar {
    fn send(&self, message: &Message, fds: &[BorrowedFd<'_>]) {
        if let Some(socket) = &self.socket {
            send(socket, &message.encode(), fds);
        }
    }

    fn format(&self, still: &Still, generation: u32, buffers: u32) {
        let timing = wire::Timing { lease_us: 1000, rate_micro: 0, watchdog_us: 0 };
        let layout = *still.buffers[0].layout();
        self.send(&Message::Format(wire::Shape { generation, buffers, timing, layout, lens: vec![4096] }), &[]);
        for (index, buffer) in (0..buffers).zip(&still.buffers) {
            let Some(Memory::Plain(memfd)) = buffer.memory().first() else { continue };
            let identity = give::identity(buffer).unwrap();
            self.send(&Message::Buffer { generation, index, identity }, &[memfd.as_fd()]);
        }
    }

    /// Descriptors of sorts that can come.
    fn fds(&self, kinds: &[u8], still: &Still) -> Vec<OwnedFd> {
        let made = kinds.iter().map(|kind| match (kind, still.buffers[0].memory().first()) {
            (0, Some(Memory::Plain(memfd))) => memfd.try_clone().unwrap(),
            (1, _) => memfd_create("x", MFdFlags::MFD_CLOEXEC).unwrap(),
            (2, _) => std::fs::File::open("/dev/null").unwrap().into(),
            _ => self.writer.try_clone().unwrap(),
        });
        made.collect()
    }
}

/// A server that says and writes anything: its receiver goes on or says what is wrong, keeps no more than can be meant, and no descriptor.
#[test]
fn servers_of_all_sorts() {
    let place = Place::parse(&format!("@dmaflow-fuzz-receiver-{}", std::process::id()));
    let listener = Listener::bind(&place, 0o600, None).unwrap();
    let still = Still::new(3);
    // Sealed, as what is shared for reading is.
    let _gifts: Vec<_> = still
        .buffers
        .iter()
        .map(|buffer| give::Gift::new(buffer, false).unwrap())
        .collect();
    let hello = Hello { place, name: "x".into(), wish: Wish::Read, answer: ANSWER };
    let cases = (any::<[bool; 2]>(), prop::collection::vec(deeds(), 1..16));
    let frames = std::cell::Cell::new(0_u64);
    run(cases, |([whole, comes_back], deeds)| {
        let mut joining = Joining::begin(&hello).unwrap();
        let (area, memfd) = SharedArea::create().unwrap();
        let (reader, writer) = tell_tale();
        let (bell, theirs) = Bell::pair().unwrap();
        let mut liar = Liar {
            socket: listener.accept().unwrap().map(|(socket, _)| socket),
            ring: ring::Server::new(area, 15),
            mapping: Mapping::new(memfd.as_fd(), size_of::<Area>(), Access::ReadWrite).unwrap(),
            bell,
            writer,
        };
        let welcome = Message::Welcome(wire::Welcome { budget: 2, fences: true, source: "liar".into() });
        liar.send(&welcome, &[memfd.as_fd(), theirs.as_fd()]);
        if whole {
            liar.format(&still, 1, 2);
        }
        let mut receiver = None;
        let (mut held, mut came) = (Vec::new(), 0);
        for deed in deeds {
            if receiver.is_none() {
                match within(OF_A_RECEIVER, || joining.step())? {
                    Ok(false) => {}
                    Ok(true) => {
                        let joined = std::mem::replace(&mut joining, Joining::begin(&hello).unwrap()).joined();
                        let mut new = Receiver::of(hello.clone(), joined.unwrap()).unwrap();
                        if comes_back {
                            new.come_back_to_it().unwrap();
                        }
                        receiver = Some(new);
                    }
                    Err(error) => {
                        let known = [Kind::Invalid, Kind::Permission, Kind::Disconnected].contains(&error.kind());
                        prop_assert!(known, "{error:?}");
                        break;
                    }
                }
            }
            match (deed, &mut receiver) {
                (Deed::Send(bytes, kinds), _) => {
                    let fds = liar.fds(&kinds, &still);
                    let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                    if let Some(socket) = &liar.socket {
                        send(socket, &bytes, &fds);
                    }
                }
                (Deed::Format(generation, buffers), _) => liar.format(&still, generation, buffers),
                (Deed::Publish(words), _) => {
                    let _ = liar.ring.publish(|_| *words, ());
                }
                (Deed::Frame(generation, buffer), _) => {
                    let entry = Entry { generation, buffer, ..Entry::default() };
                    let _ = liar.ring.publish(|_| entry.encode(), ());
                }
                (Deed::Write(at, number), _) => {
                    let bytes = number.to_ne_bytes();
                    let room = (size_of::<Area>() - at).min(bytes.len());
                    liar.mapping.write(at, &bytes[..room]);
                }
                (Deed::Ring, _) => liar.bell.ring().unwrap(),
                (Deed::HangUp, _) => liar.socket = None,
                (Deed::Next, Some(receiver)) => {
                    if let Ok(Some(frame)) = within(OF_A_RECEIVER, || receiver.try_next(Ready::FRAME))? {
                        came += 1;
                        frames.set(frames.get() + 1);
                        let one = receiver.buffers().iter().any(|buffer| buffer.same_handle(frame.buffer()));
                        prop_assert!(one, "a frame is in a buffer that was not sent");
                        let _ = (receiver.holds(&frame), frame.check());
                        held.push(frame);
                    }
                }
                (Deed::Follow, Some(receiver)) => drop(within(OF_A_RECEIVER, || receiver.follow())?),
                (Deed::Drop, Some(receiver)) => {
                    held.pop();
                    let _ = receiver.recycle();
                }
                (Deed::Next | Deed::Follow | Deed::Drop, None) => {}
            }
        }
        prop_assert!(held.len() <= came);
        drop((receiver, joining, held, liar));
        // Who came back, and those that were made for it, wait to be let in.
        while listener.accept().unwrap().is_some() {}
        prop_assert!(is_closed(&reader), "a descriptor is still open");
        Ok(())
    });
    assert!(frames.get() > 0, "no case has come as far as a frame");
}
