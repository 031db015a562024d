//! How a consumer comes to its server, the first time and again: connects, says hello, and gets a ring and buffers. Nothing here waits.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::libc;

use super::area::SharedArea;
use super::bell::Bell;
use super::fences::Announced;
use super::incoming::{Coming, Generation, learn, nonsense};
use super::socket::{Place, Received, Socket};
use super::wire::{Message, Reason, Welcome};
use crate::clock::now_us;
use crate::error::{Error, Kind, Result};

/// How long a server may take to answer, if nothing else is said.
pub(super) const ANSWER: Duration = Duration::from_secs(5);

/// What a consumer wants to do with the buffers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wish {
    Read,
    /// To write as well, or nothing.
    Write,
    /// To write as well where the server lets it, else to read.
    WriteIfItMay,
}

/// How a consumer presents itself.
#[derive(Clone, Debug)]
pub(super) struct Hello {
    pub place: Place,
    pub name: String,
    pub wish: Wish,
    /// How long the server may take to answer.
    pub answer: Duration,
}

impl Hello {
    /// The same of one that wants to read and no more.
    pub(super) fn for_reading(&self) -> Hello {
        Hello { wish: Wish::Read, ..self.clone() }
    }

    pub(super) fn answer_us(&self) -> u64 {
        u64::try_from(self.answer.as_micros()).unwrap_or(u64::MAX / 2)
    }
}

/// What a consumer has once it is served.
#[derive(Debug)]
pub(super) struct Joined {
    pub socket: Socket,
    pub area: SharedArea,
    /// Rung by the server, and for it.
    pub bell: Bell,
    pub welcome: Welcome,
    pub generation: Generation,
    /// Announced, the oldest first.
    pub coming: Coming,
    /// Of frames to come.
    pub fences: Announced,
}

/// On the way there.
#[derive(Debug)]
pub(super) struct Joining {
    place: Place,
    socket: Socket,
    wish: Wish,
    answer: Duration,
    until_us: u64,
    welcome: Option<Welcomed>,
    coming: Coming,
}

#[derive(Debug)]
struct Welcomed {
    welcome: Welcome,
    area: SharedArea,
    bell: Bell,
}

impl Joining {
    /// Connects and says hello.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if nobody shares anything there; [`Kind::Busy`] if more connect at the moment than are let in;
    /// [`Kind::Permission`] if the socket's file says no.
    pub(super) fn begin(hello: &Hello) -> Result<Joining> {
        let Hello { place, name, wish, answer } = hello;
        let socket = Socket::connect(place).map_err(|cause| {
            let code = cause.raw_os_error();
            let error = Error::from_io("connect to", place.to_string(), cause);
            match code {
                Some(libc::ECONNREFUSED | libc::ENOENT) => error
                    .kind_is(Kind::NotFound)
                    .repair("start a server there (dmaflow share --at SOCKET)"),
                Some(libc::EACCES | libc::EPERM) => {
                    error.repair("the server says who may connect (--mode, --group, --allow-uid)")
                }
                Some(libc::EAGAIN) => error.kind_is(Kind::Busy),
                _ => error,
            }
        })?;
        // One that refuses has hung up by now perhaps, and said why.
        let _ = socket.send(&Message::Hello { writable: *wish != Wish::Read, name: name.clone() }, &[]);
        let (wish, answer, until_us) = (*wish, *answer, now_us().saturating_add(hello.answer_us()));
        Ok(Joining { place: place.clone(), socket, wish, answer, until_us, welcome: None, coming: Coming::default() })
    }

    /// Whether one that was refused with this error may ask [for reading](Hello::for_reading) instead. The server does not say what it
    /// refuses: who may not read either hears the same again. What the socket's file says comes with an errno, and is said of both.
    pub(super) fn may_read_instead(&self, error: &Error) -> bool {
        self.wish == Wish::WriteIfItMay && error.kind() == Kind::Permission && error.errno().is_none()
    }

    /// When the server will have taken too long, in µs of `CLOCK_MONOTONIC`.
    pub(super) fn until_us(&self) -> u64 {
        self.until_us
    }

    /// Reads what the server has said, and tells whether that is all.
    ///
    /// # Errors
    /// [`Kind::Permission`] if the server refuses; [`Kind::Busy`] if it has no place at the moment; [`Kind::Disconnected`] if it hangs up, or its source has ended; [`Kind::Timeout`];
    /// [`Kind::Invalid`] if it does not speak the protocol.
    pub(super) fn step(&mut self) -> Result<bool> {
        let about = |kind| Error::new(kind, "join", self.place.to_string());
        while !self.is_whole() {
            let (message, fds) = match self.socket.receive(true) {
                Ok(Received::Message(Message::End { reason: Reason::Ended, .. }, _)) => {
                    return Err(about(Kind::Disconnected).because("its source has ended"));
                }
                Ok(Received::Message(Message::End { reason: Reason::Full, text }, _)) => {
                    return Err(about(Kind::Busy)
                        .because(text)
                        .repair("end another of its consumers, or try again later"));
                }
                Ok(Received::Message(Message::End { text, .. }, _)) => {
                    return Err(about(Kind::Permission).because(format!("its server refuses: {text}")));
                }
                Ok(Received::Message(message, fds)) => (message, fds),
                Ok(Received::Closed) => {
                    return Err(about(Kind::Disconnected).because("its server hung up").repair("try again"));
                }
                Ok(Received::Nothing) if now_us() < self.until_us => return Ok(false),
                Ok(Received::Nothing) => {
                    let why = format!("its server did not answer in {} s", self.answer.as_secs_f64());
                    return Err(about(Kind::Timeout).because(why));
                }
                Err(rejected) => return Err(nonsense(&self.place, &rejected.to_string())),
            };
            match (message, &self.welcome) {
                (Message::Welcome(welcome), None) => self.welcome = Some(self.welcomed(welcome, fds)?),
                (_, None) => return Err(nonsense(&self.place, "its first message is no welcome")),
                (message, Some(_)) => {
                    learn(&mut self.coming, message, fds).map_err(|why| nonsense(&self.place, &why))?;
                }
            }
        }
        Ok(true)
    }

    fn is_whole(&self) -> bool {
        self.welcome.is_some() && self.coming.front().is_some_and(Generation::is_whole)
    }

    fn welcomed(&self, welcome: Welcome, fds: Vec<OwnedFd>) -> Result<Welcomed> {
        let fds: [OwnedFd; 2] = fds
            .try_into()
            .map_err(|_| nonsense(&self.place, "its welcome lacks descriptors"))?;
        let [ring, bell] = fds;
        let area = SharedArea::open(ring.as_fd()).map_err(|cause| {
            nonsense(&self.place, "its ring could not be mapped, or is not sealed as it must be").because(cause)
        })?;
        let bell = Bell::from_fd(bell)
            .map_err(|cause| nonsense(&self.place, "its bell is no socket of that sort").because(cause))?;
        Ok(Welcomed { welcome, area, bell })
    }

    /// What there is when [`step`](Joining::step) has said so.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it has not.
    pub(super) fn joined(mut self) -> Result<Joined> {
        match (self.welcome, self.coming.pop_front()) {
            (Some(Welcomed { welcome, area, bell }), Some(generation)) => {
                let (socket, coming, fences) = (self.socket, self.coming, Announced::default());
                Ok(Joined { socket, area, bell, welcome, generation, coming, fences })
            }
            _ => Err(nonsense(&self.place, "it has no buffers")),
        }
    }
}

impl AsFd for Joining {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
